"""Many adapters over one model."""
