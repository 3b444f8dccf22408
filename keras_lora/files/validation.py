"""Checks the settings in adapter_config.json, and those of token rows."""

from keras_lora.files import config, disk
from keras_lora.files.patterns import Budget, Pattern
from keras_lora.keras_internals import warn_caller
from keras_lora.layers import settings, torch_layout
from keras_lora.layers.torch_layout import TokenRowsFiles

KEYWORD = TokenRowsFiles.keyword
# Keys that are read, or can be ignored. A warning names any other key that is set; a
# key that is null, false or empty asks for nothing.
KNOWN = set(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision
    target_modules target_parameters task_type trainable_token_indices use_rslora
    """.split()  # noqa: SIM905
)
# Keys that change the mathematics and are not supported.
REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Key -> its value if it is missing; its types, and what they are.
EXPECTED: dict[str, tuple] = {
    "use_rslora": (False, bool, "a Boolean"),
    **dict.fromkeys(config.FACTS, (None, (str, type(None)), "a name")),
    "fan_in_fan_out": (False, bool, "a Boolean"),
    "modules_to_save": ([], list, "a list of names"),
    "target_parameters": ([], list, "a list of names"),
    "target_modules": ([], (list, str), "a list of names or a regular expression"),
    "rank_pattern": ({}, dict, "an object"),
    "alpha_pattern": ({}, dict, "an object"),
}
STRICT = ("use_rslora", *config.FACTS)  # null, 0 or "" of others is as if missing


def validate_config(file) -> dict:
    """Returns the settings of an adapter_config.json, with PEFT's defaults."""
    if not isinstance(file, dict):
        raise ValueError(
            f"{config.CONFIG} must hold a JSON object. Received: {file!r}."
        )
    if file.get("peft_type") != "LORA":
        raise ValueError(
            f"{config.CONFIG} must have peft_type 'LORA'. Received: "
            f"{file.get('peft_type')!r}."
        )
    for key in REFUSED:
        if file.get(key) and key not in torch_layout.METHODS:
            raise ValueError(
                f"{config.CONFIG} has {key}={file[key]!r}, which changes the meaning "
                "of the factors and is not supported. In PEFT, merge the adapter into "
                "its base model, or train one without it."
            )
    start = file.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(
        ("pissa", "olora", "corda", "loftq", "lora_ga")
    ):
        raise ValueError(
            f"{config.CONFIG} has init_lora_weights={start!r}: PEFT changed the base "
            "weights too, so the tensors do not fit the original model. Convert the "
            "adapter in PEFT first."
        )
    values = {
        key: file.get(key, default) if key in STRICT else file.get(key) or default
        for key, (default, *_) in EXPECTED.items()
    }
    for key, (_, types, words) in EXPECTED.items():
        value = values[key]
        names = value if isinstance(value, list) else []
        if not isinstance(value, types) or not all(isinstance(x, str) for x in names):
            raise ValueError(
                f"{config.CONFIG}: {key} must be {words}. Received: {value!r}."
            )
    tokens = validate_tokens(file.get(KEYWORD))
    if not (values["target_modules"] or values["target_parameters"] or tokens):
        raise ValueError(
            f"{config.CONFIG}: target_modules must name the modules that have an "
            f"adapter. Received: {file.get('target_modules')!r}."
        )
    bias = file.get("bias", "none")
    settings.validate_bias(bias if isinstance(bias, str) else repr(bias))
    budget = Budget()
    for key, check in (
        ("rank_pattern", settings.validate_rank),
        ("alpha_pattern", validate_file_alpha),
    ):
        for rule, value in values[key].items():
            Pattern(rule, budget)
            check(value)
    return {
        **values,
        "r": settings.validate_rank(file.get("r", 8)),
        "lora_alpha": validate_file_alpha(file.get("lora_alpha", 8)),
        "dropout": settings.validate_dropout(file.get("lora_dropout", 0.0)),
        "bias": bias,
        "method": {
            word: True
            for word, method in torch_layout.METHODS.items()
            if word and file.get(word) and not method.takes_value
        },
        "tokens": tokens,
    }


def warn_of_unknown(file):
    known = KNOWN | torch_layout.METHODS.keys()
    unknown = sorted(key for key in file.keys() - known if file[key])
    if unknown:
        warn_caller(f"{config.CONFIG}: ignored {', '.join(unknown)}.")


def validate_file_alpha(alpha):
    """Checks an alpha from JSON, whose numbers may be too large for float32."""
    if settings.is_number(alpha) and not 1e-37 < alpha < 3e38:
        raise ValueError(
            f"{config.CONFIG}: lora_alpha must be a finite number > 0, in float32 too. "
            f"Received: {alpha!r}."
        )
    return settings.validate_alpha(alpha)


SUFFIX = ".token_adapter.trainable_tokens_delta"


def row_tensors(tables) -> dict:
    """Key -> rows. tables: module -> site."""
    return {
        module + SUFFIX: torch_layout.to_numpy(x.lora.rows)
        for module, x in tables.items()
    }


def take_rows(tensors) -> dict:
    """Removes the rows from a file's tensors and returns {module: rows}."""
    keys = [key for key in tensors if key.endswith(SUFFIX)]
    return {key.removesuffix(SUFFIX): tensors.pop(key) for key in keys}


def validate_tokens(indices) -> dict:
    """{module, or the end of one: ids}; "" means the model's token embedding."""
    if not indices:
        return {}
    named = indices if isinstance(indices, dict) else {"": indices}
    try:
        return {
            name: settings.validate_indices(indices) for name, indices in named.items()
        }
    except ValueError as error:
        raise ValueError(f"{config.CONFIG}: {error}") from error


def validate_rows(rows, tokens) -> dict:
    """{module: (ids, rows)}; a ValueError where configuration and tensors disagree."""
    pairs = {}
    for module, values in rows.items():
        names = [n for n in tokens if not n or f".{module}".endswith(f".{n}")]
        if len(names) != 1 or values.ndim != 2 or len(values) != len(tokens[names[0]]):
            raise ValueError(
                f"{disk.TENSORS} has rows of shape {values.shape} for {module!r}, but "
                f"{config.CONFIG} has {KEYWORD}={tokens}: the two do not belong "
                "together."
            )
        pairs[module] = tokens[names[0]], values
    if len(pairs) < len(tokens):
        raise ValueError(
            f"{config.CONFIG} has {KEYWORD}={tokens}, but {disk.TENSORS} has no rows "
            "for some of them."
        )
    return pairs
