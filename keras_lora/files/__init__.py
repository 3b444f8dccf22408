"""Adapters on disk, in the format of PEFT and of others."""
