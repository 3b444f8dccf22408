"""One layer: its frozen kernel, its adapter, and the kinds of layers."""
