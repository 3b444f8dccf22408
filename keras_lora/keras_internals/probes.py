"""Probes for private names, and the error where one is missing."""

import importlib
import inspect
import pkgutil
import types

import keras

from keras_lora.keras_internals import classes

# Versions with which the laws have passed; see docs/compatibility.md.
OLDEST, NIGHTLY = "3.12", "3.16.0.dev2026102704"
HUB_NIGHTLY = "0.33.0.dev202610250352"
TESTED = {
    "Keras": f"{OLDEST}, 3.15 and {NIGHTLY}",
    "TensorFlow": "2.21",
    "torch": "2.13",
    "JAX": "0.10",
    "KerasHub": f"0.32 and {HUB_NIGHTLY}",
}
MODULES = {
    "Keras": "keras",
    "TensorFlow": "tensorflow",
    "torch": "torch",
    "JAX": "jax",
    "KerasHub": "keras_hub",
}

MISSING: dict = {}  # feature -> rows of names that it needs and that are missing
CONVERTERS = "keras_hub.src.utils.transformers"
ON_JAX = keras.backend.backend() == "jax"
OPTIMIZER = keras.optimizers.Optimizer


def module(name):
    """Returns a module by its name, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def require(feature):
    """Raises ValueError if a package lacks what a feature needs."""
    if feature in MISSING:
        raise ValueError(sentence(feature))


def sentence(feature) -> str:
    rows = MISSING[feature]
    package = rows[0].package
    names = " and ".join(row.name for row in rows if row.package == package)
    version = module(MODULES[package]).__version__
    return (
        f"keras_lora does not know how {package} {version} works inside: without "
        f"{names} there are no {feature}. It was tested with {package} "
        f"{TESTED[package]}: install one of these, or a later keras_lora."
    )


global_state = module("keras.src.backend.common.global_state")
masking = module("keras.src.backend.common.masking")


def mentions(owner, word) -> bool:
    """Whether a word is in the code of a module, or of a class and its bases.

    This finds attributes that a constructor sets, without making an object.
    """
    owners = getattr(owner, "__mro__", (owner,))
    held = [x for each in owners for x in vars(each).values()]
    functions = [x.fget if isinstance(x, property) else x for x in held]
    # Nothing else is looked at: a lazy module of Keras's would be imported.
    codes = [
        inspect.unwrap(x).__code__
        for x in functions
        if isinstance(x, types.FunctionType)
    ]
    return any(word in (*code.co_names, *code.co_consts) for code in codes)


def sample():
    """A layer without weights."""
    return keras.layers.Layer(name="sample")


def has(*names):
    """A probe: a layer, or its class, has these attributes."""
    return lambda: all(hasattr(sample(), name) for name in names)


def code_has(owner, word):
    return lambda: mentions(owner, word)


def calls_are_recorded() -> bool:
    """Whether Keras's global state tells which layer is called, or built, and how."""
    return (
        hasattr(global_state, "get_global_attribute")
        and mentions(keras.layers.Layer, "current_call_ctx")
        and mentions(keras.layers.Layer, "entry_layer")
        and mentions(keras.StatelessScope, "stateless_scope")
        and mentions(keras.name_scope, "name_scope_stack")
    )


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

    layer, new_layer = Before(name="sample"), After(name="sample")
    classes.change_class(layer, After)
    layer.build((1,))
    parameters = [
        [list(x.parameters) for x in vars(each).values() if hasattr(x, "parameters")]
        for each in (layer, new_layer)
    ]
    return hasattr(layer, "was_built") and parameters[0] == parameters[1] != []


def has_tensor_history() -> bool:
    tensor = keras.Input((1,), name="sample")
    [node] = tensor._keras_history.operation._inbound_nodes
    return hasattr(node, "arguments") and node.outputs[0] is tensor


def can_unfreeze_variable() -> bool:
    """Whether a TensorFlow variable that was created frozen can train later."""
    tf = module("tensorflow")
    with tf.Graph().as_default():
        variable = tf.Variable(0.0, trainable=False)
    variable._trainable = True
    return variable.trainable


def detects_xla() -> bool:
    tf = module("tensorflow")
    graph = tf.Graph()
    traced = tf.__internal__.FuncGraph("sample")
    return graph._get_control_flow_context() is None and hasattr(traced, "outer_graph")


def converter_names(package) -> list:
    """The modules of KerasHub's converters."""
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [f"{package.__name__}.{x}" for x in names if x.startswith("convert_")]


def converters_are_there() -> bool:
    """Whether each converter can be called with a loader that has no file."""
    converters = [module(name) for name in converter_names(module(CONVERTERS))]
    return bool(converters) and all(
        hasattr(x, "backbone_cls")
        and len(inspect.signature(x.convert_weights).parameters) == 3
        for x in converters
    )


def traces_can_be_set() -> bool:
    return hasattr(module("jax").core.Tracer, "_trace") and hasattr(
        module("jax.extend.core"), "set_current_trace"
    )


def processes_can_meet() -> bool:
    state = getattr(module("jax._src.distributed"), "global_state", None)
    return hasattr(state, "client")
