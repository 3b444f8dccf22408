"""What a configuration of an owner of adapted layers holds."""

FIELDS = {
    "requires",  # stands in the error of a process that does not know this class
    "layer",
    "model",  # the name of "layer" in files of the first version
    "adapters",
    "places",
    "quantized",
    "merge_weights",
    "trainable",
    "trainable_before",
    "trained_beside",
}


def plain_part(config):
    """The plain owner's, with what a reader adds (KerasHub: a dtype) for it."""
    plain = config.get("layer") or config["model"]
    more = {key: value for key, value in config.items() if key not in FIELDS}
    return {**plain, "config": {**plain["config"], **more}}
