"""What this package uses of Keras that is not public: one table, with a probe each.

The probes run once, when the package is imported, and make no array. Where one fails,
what needs the name refuses before it changes anything; the import itself refuses
where every LoRA layer does.
"""

import importlib
import inspect
import types
from collections.abc import Callable
from typing import NamedTuple

import keras

from keras_lora.keras_internals.classes import change_class

# The versions of Keras with which the laws have passed; see docs/compatibility.md.
OLDEST, NIGHTLY = "3.12", "3.16.0.dev2026102704"
TESTED = f"{OLDEST}, 3.15 and {NIGHTLY}"

# What needs a name, in words that an error can use.
LAYERS = "LoRA layers"
MODELS = "adapters of a model that exists"
QUANTIZED = "adapters over quantized kernels"
LORA_PLUS = "LoRAPlus"
LAYOUTS = "adapters under keras.distribution"
BANKS = "banks of adapters"
MASKS = "ReversibleEmbedding and AdapterBank.fit"
HUB = 'names="transformers"'


class PrivateName(NamedTuple):
    """One name: what needs it, why no public way serves, and whether it is there."""

    name: str
    needed_by: str
    why: str
    is_there: Callable[[], bool]


def module(name):
    """A module of Keras; None: there is none of this name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


global_state = module("keras.src.backend.common.global_state")
masking = module("keras.src.backend.common.masking")


def mentions(owner, word) -> bool:
    """Whether code of a class, of those that it extends, or of a module has a word.

    Attributes that a constructor sets are found so without making an object.
    """
    owners = getattr(owner, "__mro__", (owner,))
    functions = [x for each in owners for x in vars(each).values()]
    functions = [getattr(x, "fget", None) or inspect.unwrap(x) for x in functions]
    return any(
        word in (*x.__code__.co_names, *x.__code__.co_consts)
        for x in functions
        if isinstance(x, types.FunctionType)
    )


def sample():
    """A layer without weights."""
    return keras.layers.Layer(name="sample")


def has(*names):
    """A probe: a layer, or its class, has these attributes."""
    return lambda: all(hasattr(sample(), name) for name in names)


def code_has(owner, word):
    return lambda: mentions(owner, word)


def class_changes() -> bool:
    """Whether a layer of another class builds and is called as one of that class."""

    class Before(keras.layers.Layer):
        def call(self, inputs):
            return inputs

    class After(Before):
        def build(self, input_shape=None):
            self.was_built = True

        def call(self, inputs, training=None):
            return inputs

    layer, made = Before(name="sample"), After(name="sample")
    change_class(layer, After)
    layer.build((1,))
    parameters = [
        [list(x.parameters) for x in vars(each).values() if hasattr(x, "parameters")]
        for each in (layer, made)
    ]
    return hasattr(layer, "was_built") and parameters[0] == parameters[1] != []


def tensors_know_their_operation() -> bool:
    tensor = keras.Input((1,), name="sample")
    history = getattr(tensor, "_keras_history", None)
    return hasattr(getattr(history, "operation", None), "_inbound_nodes")


ON_JAX = keras.backend.backend() == "jax"
OPTIMIZER = keras.optimizers.Optimizer

TABLE = [
    PrivateName(
        "Layer._tracker",
        LAYERS,
        "A built layer takes no new state otherwise (Keras issue 18601).",
        lambda: all(
            hasattr(getattr(sample(), "_tracker", None), name)
            for name in ("lock", "locked", "unlock", "untrack")
        ),
    ),
    PrivateName(
        "Layer._track_variable, _untrack_variable",
        LAYERS,
        "W moves among the variables that `trainable` does not reach; deleting the "
        "attribute and setting it again collects garbage each time.",
        has("_track_variable", "_untrack_variable"),
    ),
    PrivateName(
        "Layer._trainable_variables, _non_trainable_variables",
        LAYERS,
        "The public lists hold those of sublayers too, and none of a frozen layer.",
        has("_trainable_variables", "_non_trainable_variables"),
    ),
    PrivateName(
        "Layer._layers",
        LAYERS,
        "A layer that is no model has no public list of the layers inside it.",
        has("_layers"),
    ),
    PrivateName(
        "Layer._flatten_layers",
        LAYERS,
        "Keras before 3.16 quantizes only layers in which it finds no other.",
        has("_flatten_layers"),
    ),
    PrivateName(
        "Variable._autocast",
        LAYERS,
        "W is read as it is stored; `add_weight(autocast=False)` is for new ones.",
        code_has(keras.Variable, "_autocast"),
    ),
    PrivateName(
        "keras.src.backend.common.global_state: current_call_ctx, entry_layer, "
        "stateless_scope",
        LAYERS,
        "Nothing public tells a layer that is read or assigned to inside of a call.",
        lambda: (
            hasattr(global_state, "get_global_attribute")
            and mentions(keras.layers.Layer, "current_call_ctx")
            and mentions(keras.layers.Layer, "entry_layer")
            and mentions(keras.StatelessScope, "stateless_scope")
        ),
    ),
    PrivateName(
        "Layer.__new__: a function in front of `build`, with the method in a closure",
        MODELS,
        "A layer cannot change its class in a public way.",
        class_changes,
    ),
    PrivateName(
        "Layer._called",
        MODELS,
        "`built` does not tell a layer that its owner has never called.",
        has("_called"),
    ),
    PrivateName(
        "KerasTensor._keras_history, Operation._inbound_nodes",
        MODELS,
        "`Operation.input` is that of the first call alone.",
        tensors_know_their_operation,
    ),
    PrivateName(
        "Model._compile_config, _compiled_trainable_state (since Keras 3.13)",
        MODELS,
        "`compile_from_config` loses what a configuration cannot say.",
        lambda: (
            mentions(keras.Model, "_compile_config")
            and mentions(keras.Model, "_compiled_trainable_state")
            == mentions(keras.Model, "_warn_if_trainable_state_changed")
        ),
    ),
    PrivateName(
        "Optimizer._trainable_variables",
        MODELS,
        "An optimizer does not say publicly for which variables it was built.",
        code_has(OPTIMIZER, "_trainable_variables"),
    ),
    PrivateName(
        "global_state: use_legacy_config",
        MODELS,
        "A configuration is asked for in the same way by .keras and by .h5.",
        code_has(keras.Sequential, "use_legacy_config"),
    ),
    PrivateName(
        "Layer._dtype_policy, _is_quantized",
        QUANTIZED,
        "The public setter quantizes, or writes into the policies of all layers.",
        lambda: (
            hasattr(sample(), "_dtype_policy")
            and mentions(keras.layers.Layer, "_is_quantized")
        ),
    ),
    PrivateName(
        "Optimizer._apply_weight_decay, _use_weight_decay, _get_variable_index, "
        "_learning_rate",
        LORA_PLUS,
        "No optimizer of Keras's has a rate for one variable.",
        lambda: (
            all(
                hasattr(OPTIMIZER, name)
                for name in (
                    "_apply_weight_decay",
                    "_use_weight_decay",
                    "_get_variable_index",
                )
            )
            and mentions(OPTIMIZER, "_learning_rate")
        ),
    ),
    PrivateName(
        "Variable._layout",
        LAYOUTS,
        "`add_weight` takes no layout.",
        lambda: not ON_JAX or mentions(keras.Variable, "_layout"),
    ),
    PrivateName(
        "Model._jax_state",
        BANKS,
        "What a loop that failed has left there would become the weights.",
        lambda: not ON_JAX or mentions(keras.Model, "_jax_state"),
    ),
    PrivateName(
        "keras.src.backend.common.masking: get_keras_mask, set_keras_mask",
        MASKS,
        "The mask that a layer has put on its outputs has no public reader.",
        lambda: (
            hasattr(masking, "get_keras_mask") and hasattr(masking, "set_keras_mask")
        ),
    ),
    PrivateName(
        "global_state: uninitialized_variables",
        HUB,
        "A model whose variables hold nothing is left out of the next scope's.",
        lambda: any(
            mentions(inspect.getmodule(cls), "uninitialized_variables")
            for cls in keras.Variable.__mro__
        ),
    ),
]

FOUND: dict = {}  # feature -> names that it needs and Keras has not


def probe():
    """Looks for every name once; an ImportError where all layers need one."""
    version, oldest = (x.split(".")[:2] for x in (keras.__version__, OLDEST))
    if list(map(int, version)) < list(map(int, oldest)):
        raise ImportError(
            f"keras_lora needs Keras {OLDEST} or later, and Keras {keras.__version__} "
            f"is installed. It was tested with Keras {TESTED}."
        )
    for row in TABLE:
        try:
            found = row.is_there()
        except Exception:  # whatever another Keras raises
            found = False
        if not found:
            FOUND.setdefault(row.needed_by, []).append(row.name)
    if LAYERS in FOUND:
        raise ImportError(sentence(LAYERS))


def require(feature):
    """Raises ValueError if this Keras has not what a feature needs."""
    if feature in FOUND:
        raise ValueError(sentence(feature))


def sentence(feature) -> str:
    return (
        f"keras_lora does not know how Keras {keras.__version__} works inside: without "
        f"{' and '.join(FOUND[feature])} there are no {feature}. It was tested with "
        f"Keras {TESTED}: install one of these, or a later keras_lora."
    )
