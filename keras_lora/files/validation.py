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
    rslora = file.get("use_rslora", False)
    heads = file.get("modules_to_save") or []
    if not isinstance(rslora, bool) or not is_list_of(heads, str):
        raise ValueError(
            f"{config.CONFIG}: use_rslora must be a Boolean and modules_to_save a list "
            f"of names. Received: {rslora!r} and {heads!r}."
        )
    bias = file.get("bias", "none")
    settings.validate_bias(bias if isinstance(bias, str) else repr(bias))
    parameters = file.get("target_parameters") or []
    if not is_list_of(parameters, str):
        raise ValueError(
            f"{config.CONFIG}: target_parameters must be a list of names. Received: "
            f"{parameters!r}."
        )
    targets = file.get("target_modules") or []
    tokens = validate_tokens(file.get(KEYWORD))
    named = isinstance(targets, str) or is_list_of(targets, str)
    if not named or not (targets or parameters or tokens):
        raise ValueError(
            f"{config.CONFIG}: target_modules must be a list of names or a regular "
            f"expression. Received: {targets!r}."
        )
    for key in config.FACTS:
        if not isinstance(file.get(key), (str, type(None))):
            raise ValueError(
                f"{config.CONFIG}: {key} must be a name. Received: {file[key]!r}."
            )
    fan_in_fan_out = file.get("fan_in_fan_out") or False
    if not isinstance(fan_in_fan_out, bool):
        raise ValueError(
            f"{config.CONFIG}: fan_in_fan_out must be a Boolean. Received: "
            f"{fan_in_fan_out!r}."
        )
    budget = Budget()
    for key, check in (
        ("rank_pattern", settings.validate_rank),
        ("alpha_pattern", validate_file_alpha),
    ):
        values = file.get(key) or {}
        if not isinstance(values, dict):
            raise ValueError(
                f"{config.CONFIG}: {key} must be an object. Received: {values!r}."
            )
        for rule, value in values.items():
            Pattern(rule, budget)
            check(value)
    return {
        "r": settings.validate_rank(file.get("r", 8)),
        "lora_alpha": validate_file_alpha(file.get("lora_alpha", 8)),
        "rank_pattern": file.get("rank_pattern") or {},
        "alpha_pattern": file.get("alpha_pattern") or {},
        "dropout": settings.validate_dropout(file.get("lora_dropout", 0.0)),
        "use_rslora": rslora,
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": targets,
        "target_parameters": parameters,
        "bias": bias,
        "modules_to_save": heads,
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


def is_list_of(values, kind):
    return isinstance(values, list) and all(isinstance(v, kind) for v in values)


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
