"""Asks KerasHub's converters which tensor of transformers a variable is.

A converter is a module with `backbone_cls` and
`convert_weights(backbone, loader, transformers_config)`, which calls
`loader.port_weight(variable, key, hook)` for most variables and assigns the others
itself. It is called on a copy of the model, with a loader that has no file. There is no
public way to ask.
"""

import contextlib
import functools
import io
import sys
import warnings

import keras
import numpy as np

from keras_lora.keras_internals import private_names, probes

UNINITIALIZED = "uninitialized_variables"
# Keys of transformers' configurations -> attributes of backbones.
WORDS = {"n_embd": "hidden_dim", "emb_layer_norm_before": "use_pre_layer_norm"}


def is_backbone(layer):
    """Whether a layer is a backbone of KerasHub, which is not imported for this."""
    hub = sys.modules.get("keras_hub")
    return hub is not None and isinstance(layer, hub.models.Backbone)


@functools.cache
def converters() -> dict:
    """Returns {name of a family: its converter's module}."""
    probes.require(private_names.HUB)
    if probes.module("keras_hub") is None:
        return {}
    private_names.probe_package("KerasHub")
    probes.require(private_names.HUB)
    names = probes.converter_names(probes.module(probes.CONVERTERS))
    return {name.rpartition("convert_")[2]: probes.module(name) for name in names}


def family_of(backbone_class):
    """Returns the family whose converter is for a class, or for its nearest base."""
    made_for = {}
    for family, converter in converters().items():
        made_for.setdefault(converter.backbone_cls, family)
    for cls in backbone_class.__mro__:
        if cls in made_for:
            return made_for[cls]
    # Llama uses the converter of Llama 3, whose backbone extends its own.
    extended = [f for cls, f in made_for.items() if issubclass(cls, backbone_class)]
    return extended[0] if len(extended) == 1 else None


def uninitialized_copy(backbone_class, config):
    """Creates a backbone from a configuration, whose variables have no values."""
    before = list(probes.global_state.get_global_attribute(UNINITIALIZED) or [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            copy = backbone_class.from_config(config)
    finally:  # otherwise the next scope would initialize them
        probes.global_state.set_global_attribute(UNINITIALIZED, before)
    copy.trainable = True  # otherwise frozen weights would come last
    for variable in copy.variables:
        variable.assign = lambda value: None
    return copy


def add_absent_parts(copy):
    """Replaces parts that are None, which some converters read without a check.

    Returns:
        Whether there were any.
    """
    parts = vars(copy).items()
    missing = [x for x, part in parts if part is None and not x.startswith("_")]
    for part in missing:
        setattr(copy, part, Absent())
    return bool(missing)


def run_converter(family, backbone, port):
    """Calls `port(variable, key, hook)` for each variable of the family's converter."""
    loader, config = Loader(port), Config(family, backbone)
    with (
        keras.StatelessScope(initialize_variables=False),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        converters()[family].convert_weights(backbone, loader, config)


class Absent:
    """Null object: every attribute, call and item of it is absent again."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __getitem__(self, key):
        return self

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0

    __index__ = __len__  # for range()


class Loader:
    """Replaces KerasHub's loader of safetensors."""

    safetensor_config = prefix = preset = None

    def __init__(self, port):
        self.port = port

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        if isinstance(keras_variable, keras.Variable):
            self.port(keras_variable, hf_weight_key, hook_fn)

    def get_tensor(self, key):
        """Returns one zero, with as many axes as the converter expects."""
        if key.endswith((".gamma", ".beta")):  # only in TensorFlow's checkpoints
            raise KeyError(key)
        if key.endswith("_blocks"):
            return np.zeros((1, 1, 1, 1), "uint8")
        ndim = {"bias": 1, "scales": 3, "gate_up_proj": 3, "down_proj": 3}
        end = key.rpartition(".")[2].rpartition("_")[2]
        return np.zeros((1,) * ndim.get(end, ndim.get(key.rpartition(".")[2], 2)))


class Config(dict):
    """Replaces transformers' config.json by the attributes of the backbone."""

    def __init__(self, family, backbone):
        if getattr(backbone, "vision_encoder", self) is None:
            family += "_text"
        if getattr(backbone, "use_post_ffw_norm", False):
            family = {"gemma": "gemma2"}.get(family, family)
        super().__init__(model_type=family)
        self.backbone = backbone

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default

    def __missing__(self, key):
        if key == "text_config" and hasattr(self.backbone, "language_model"):  # BLIP-2
            inner = self.backbone.language_model
            return Config("t5" if "T5" in type(inner).__name__ else "opt", inner)
        word = WORDS.get(key, key)
        if not hasattr(self.backbone, word):
            raise KeyError(key)
        return getattr(self.backbone, word)
