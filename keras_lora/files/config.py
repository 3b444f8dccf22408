"""adapter_config.json: the settings of an adapter, in PEFT's words."""

import collections
import warnings
import weakref

from keras_lora.files.patterns import Budget
from keras_lora.files.patterns import parse
from keras_lora.files.targeting import pattern
from keras_lora.layers.methods import methods_in_files
from keras_lora.layers.settings import checked_alpha
from keras_lora.layers.settings import checked_dropout
from keras_lora.layers.settings import checked_rank
from keras_lora.layers.settings import is_number
from keras_lora.models.freezing import checked_bias

CONFIG = "adapter_config.json"
# What decides how the tensors are read: it also stands in the tensors' metadata.
SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def stated(config) -> dict:
    """The settings that the tensors mean nothing without, another method's too."""
    methods = [word for word in methods_in_files() if word and config.get(word)]
    return {key: config.get(key) for key in (*SETTINGS, *methods)}


# What a file says about itself, and a file of the same adapter says again.
KEPT = ("task_type", "base_model_name_or_path")
_said_of = weakref.WeakKeyDictionary()  # model -> the same of the file it has loaded
# What a reader may meet and need not obey. Another key that is set is named in a
# warning; one that is null, false or empty asks for nothing.
KNOWN = set(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights
    layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core
    modules_to_save peft_type peft_version qalora_group_size r rank_pattern revision
    target_modules target_parameters task_type use_rslora
    """.split()  # noqa: SIM905
)
# What changes the mathematics, and is not read.
REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)


def remember_file(model, config):
    _said_of[model] = {key: config.get(key) for key in KEPT}


def said_of(model, given):
    """What a file of the model says about itself: as given, else as it was loaded."""
    for key, value in given.items():
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"`{key}` must be a name. Received: {key}={value!r}.")
    loaded = _said_of.get(model, dict.fromkeys(KEPT))
    return {key: given[key] or loaded[key] for key in KEPT}


def settings(ranks, alphas, use_rslora, parameters=(), **others):
    """The configuration of an adapter with these ranks and alphas per module.

    parameters: the modules whose weight PEFT adapts as a parameter.
    """
    alphas = {module: checked_alpha(alpha) for module, alpha in alphas.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(ranks.keys() - parameters) or None,
        # PEFT warns of a pattern that means a parameter, though it obeys it.
        "r": most_common([ranks[m] for m in parameters] or ranks.values()),
        "lora_alpha": most_common([alphas[m] for m in parameters] or alphas.values()),
    }
    optional = {
        "target_parameters": sorted(f"{module}.weight" for module in parameters),
        "rank_pattern": pattern(ranks, config["r"], parameters),
        "alpha_pattern": pattern(alphas, config["lora_alpha"], parameters),
        "use_rslora": use_rslora,
        **others,
    }
    return config | {key: value for key, value in optional.items() if value}


def most_common(values):
    return collections.Counter(values).most_common(1)[0][0]


def checked_config(file):
    if not isinstance(file, dict):
        raise ValueError(f"{CONFIG} must hold a JSON object. Received: {file!r}.")
    if file.get("peft_type") != "LORA":
        raise ValueError(
            f"{CONFIG} must have peft_type 'LORA'. Received: {file.get('peft_type')!r}."
        )
    for key in REFUSED:
        if file.get(key) and key not in methods_in_files():
            raise ValueError(
                f"{CONFIG} has {key}={file[key]!r}, which changes what the factors "
                "mean and is not read. In PEFT, merge the adapter into its base model, "
                "or train one without it."
            )
    start = file.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(
        ("pissa", "olora", "corda", "loftq", "lora_ga")
    ):
        raise ValueError(
            f"{CONFIG} has init_lora_weights={start!r}: its base weights were changed, "
            "so that the tensors do not fit the model. Convert it in PEFT first."
        )
    rslora = file.get("use_rslora", False)
    heads = file.get("modules_to_save") or []
    if not isinstance(rslora, bool) or not is_list_of(heads, str):
        raise ValueError(
            f"{CONFIG}: use_rslora must be a Boolean and modules_to_save a list of "
            f"names. Received: {rslora!r} and {heads!r}."
        )
    bias = file.get("bias", "none")
    checked_bias(bias if isinstance(bias, str) else repr(bias))
    parameters = file.get("target_parameters") or []
    if not is_list_of(parameters, str):
        raise ValueError(
            f"{CONFIG}: target_parameters must be a list of names. Received: "
            f"{parameters!r}."
        )
    targets = file.get("target_modules") or []
    if is_list_of(targets, str):  # a module's weight is as good as the module
        ends = [p.removesuffix(".weight") for p in parameters if p.endswith(".weight")]
        targets = targets + ends
    if not (isinstance(targets, str) or is_list_of(targets, str)) or not targets:
        raise ValueError(
            f"{CONFIG}: target_modules must be a list of names or an expression. "
            f"Received: {targets!r}."
        )
    for key in KEPT:
        if not isinstance(file.get(key), (str, type(None))):
            raise ValueError(
                f"{CONFIG}: {key} must be a name. Received: {file[key]!r}."
            )
    fan_in_fan_out = file.get("fan_in_fan_out") or False
    if not isinstance(fan_in_fan_out, bool):
        raise ValueError(
            f"{CONFIG}: fan_in_fan_out must be a Boolean. Received: {fan_in_fan_out!r}."
        )
    budget = Budget()
    for key, check in (
        ("rank_pattern", checked_rank),
        ("alpha_pattern", checked_file_alpha),
    ):
        values = file.get(key) or {}
        if not isinstance(values, dict):
            raise ValueError(
                f"{CONFIG}: {key} must be an object. Received: {values!r}."
            )
        for rule, value in values.items():
            parse(rule, budget)
            check(value)
    return {
        "r": checked_rank(file.get("r", 8)),
        "lora_alpha": checked_file_alpha(file.get("lora_alpha", 8)),
        "rank_pattern": file.get("rank_pattern") or {},
        "alpha_pattern": file.get("alpha_pattern") or {},
        "dropout": checked_dropout(file.get("lora_dropout", 0.0)),
        "use_rslora": rslora,
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": targets,
        "bias": bias,
        "modules_to_save": heads,
        "method": {
            word: True for word in methods_in_files() if word and file.get(word)
        },
    }


def warn_of_unknown(file):
    known = KNOWN | methods_in_files().keys()
    unknown = sorted(key for key in file.keys() - known if file[key])
    if unknown:
        warnings.warn(f"{CONFIG}: ignored {', '.join(unknown)}.", stacklevel=5)


def is_list_of(values, kind):
    return isinstance(values, list) and all(isinstance(v, kind) for v in values)


def checked_file_alpha(alpha):
    """JSON's numbers have no limits, the scaling here is a float32."""
    if is_number(alpha) and not 1e-37 < alpha < 3e38:
        raise ValueError(
            f"{CONFIG}: lora_alpha must be a finite number > 0, in float32 too. "
            f"Received: {alpha!r}."
        )
    return checked_alpha(alpha)
