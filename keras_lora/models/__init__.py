"""A whole model: which layers are adapted, merged, exported."""
