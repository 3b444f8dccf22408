"""What a configuration of an owner of adapted layers holds."""

FIELDS = {
    "requires",  # stands in the error of a process that does not know this class
    "layer",
    "model",  # the name of "layer" in files of the first version
    "adapters",
    "weight_adapters",  # of layers with several weights
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


def plain_float_config(config):
    """A configuration in which all layers are plain, and float32.

    What is built of it has the weights that its authors meant, in their order.
    """
    if isinstance(config, list):
        return [plain_float_config(part) for part in config]
    if not isinstance(config, dict):
        return config
    name = str(config.get("registered_name"))
    if name == "keras_lora>Adapted":
        config = plain_part(config["config"])
    elif name.startswith("keras_lora>LoRA"):
        plain = {**config["config"], "rank": 0, "frozen": []}
        config = {**config, "config": plain}
    found = {key: plain_float_config(part) for key, part in config.items()}
    if "class_name" in found and "dtype" in (found.get("config") or {}):
        found["config"] |= {"dtype": "float32"}
        if "quantization_config" in found["config"]:
            found["config"]["quantization_config"] = None
    return found
