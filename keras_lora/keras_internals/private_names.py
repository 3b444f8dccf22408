"""The private names of Keras that this package uses, with a probe for each.

The probes run once, when the package is imported (those of KerasHub on its first use),
and create no arrays. If one fails, features that need the name raise before they change
anything. The import itself raises only if every LoRA layer needs the name.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras

from keras_lora.keras_internals import probes

# Features that need private names, in the words of errors.
LAYERS = "LoRA layers"
MODELS = "adapters of a model that exists"
QUANTIZED = "adapters over quantized kernels"
LORA_PLUS = "LoRAPlus"
PROCESSES = "adapters over several processes"
REMAT = "adapters in a keras.RematScope"
MASKS = "ReversibleEmbedding and AdapterBank.fit"
HUB = 'names="transformers"'
DROPOUT = "adapters with dropout in compiled functions"
IN_FUNCTIONS = "layers with `use_dora` that are built inside a compiled function"


class PrivateName(NamedTuple):
    """A private name: what needs it, why nothing public serves, and its probe."""

    name: str
    needed_by: str
    why: str
    is_there: Callable[[], bool]
    package: str = "Keras"


TABLE = [
    PrivateName(
        "Layer._tracker",
        LAYERS,
        "A built layer takes no new state otherwise (Keras issue 18601).",
        lambda: all(
            hasattr(getattr(probes.sample(), "_tracker", None), name)
            for name in ("lock", "locked", "unlock", "untrack")
        ),
    ),
    PrivateName(
        "Layer._track_variable, _untrack_variable",
        LAYERS,
        "W moves among the variables that `trainable` does not reach; deleting the "
        "attribute and setting it again collects garbage each time.",
        probes.has("_track_variable", "_untrack_variable"),
    ),
    PrivateName(
        "Layer._trainable_variables, _non_trainable_variables",
        LAYERS,
        "The public lists hold those of sublayers too, and none of a frozen layer.",
        probes.has("_trainable_variables", "_non_trainable_variables"),
    ),
    PrivateName(
        "Layer._layers",
        LAYERS,
        "A layer that is no model has no public list of the layers inside it.",
        probes.has("_layers"),
    ),
    PrivateName(
        "Layer._flatten_layers",
        LAYERS,
        "Keras before 3.16 quantizes only layers in which it finds no other.",
        probes.has("_flatten_layers"),
    ),
    PrivateName(
        "Variable._autocast",
        LAYERS,
        "W is read as it is stored; `add_weight(autocast=False)` is for new ones.",
        probes.code_has(keras.Variable, "_autocast"),
    ),
    PrivateName(
        "keras.src.backend.common.global_state: current_call_ctx, entry_layer, "
        "stateless_scope, name_scope_stack",
        LAYERS,
        "No public API says whether code runs inside a layer's call.",
        probes.calls_are_recorded,
    ),
    PrivateName(
        "Layer.__new__: a function in front of `build`, with the method in a closure",
        MODELS,
        "A layer cannot change its class in a public way.",
        probes.class_changes,
    ),
    PrivateName(
        "Layer._called",
        MODELS,
        "`built` does not tell a layer that its owner has never called.",
        probes.has("_called"),
    ),
    PrivateName(
        "KerasTensor._keras_history, Operation._inbound_nodes",
        MODELS,
        "`Operation.input` has only the inputs of the first call.",
        probes.has_tensor_history,
    ),
    PrivateName(
        "Model._compile_config, _compiled_trainable_state (since Keras 3.13)",
        MODELS,
        "`compile_from_config` drops objects that a configuration cannot describe.",
        lambda: (
            probes.mentions(keras.Model, "_compile_config")
            and probes.mentions(keras.Model, "_compiled_trainable_state")
            == probes.mentions(keras.Model, "_warn_if_trainable_state_changed")
        ),
    ),
    PrivateName(
        "Optimizer._trainable_variables",
        MODELS,
        "An optimizer does not say publicly for which variables it was built.",
        probes.code_has(probes.OPTIMIZER, "_trainable_variables"),
    ),
    PrivateName(
        "global_state: use_legacy_config",
        MODELS,
        "Keras calls `get_config` in the same way for .keras and .h5 files.",
        probes.code_has(keras.Sequential, "use_legacy_config"),
    ),
    PrivateName(
        "Layer._dtype_policy, _is_quantized",
        QUANTIZED,
        "The public setter quantizes, or writes into the policies of all layers.",
        lambda: (
            hasattr(probes.sample(), "_dtype_policy")
            and probes.mentions(keras.layers.Layer, "_is_quantized")
        ),
    ),
    PrivateName(
        "Optimizer._apply_weight_decay, _use_weight_decay, _get_variable_index, "
        "_learning_rate",
        LORA_PLUS,
        "No optimizer of Keras's has a rate for one variable.",
        lambda: (
            all(
                hasattr(probes.OPTIMIZER, name)
                for name in (
                    "_apply_weight_decay",
                    "_use_weight_decay",
                    "_get_variable_index",
                )
            )
            and probes.mentions(probes.OPTIMIZER, "_learning_rate")
        ),
    ),
    PrivateName(
        "Model._jax_state",
        MODELS,
        "A failed loop leaves its state there, and the next one would load it into the "
        "weights.",
        lambda: not probes.ON_JAX or probes.mentions(keras.Model, "_jax_state"),
    ),
    PrivateName(
        "Operation._remat_mode",
        REMAT,
        "A cell would be rematerialized a second time inside its layer.",
        probes.has("_remat_mode"),
    ),
    PrivateName(
        "SeedGenerator._initial_seed",
        REMAT,
        "A seed that was drawn already cannot be given to `keras.random.dropout`.",
        probes.code_has(keras.random.SeedGenerator, "_initial_seed"),
    ),
    PrivateName(
        "keras.src.backend.common.masking: get_keras_mask, set_keras_mask",
        MASKS,
        "The mask that a layer has put on its outputs has no public reader.",
        lambda: (
            hasattr(probes.masking, "get_keras_mask")
            and hasattr(probes.masking, "set_keras_mask")
        ),
    ),
    PrivateName(
        "global_state: uninitialized_variables",
        HUB,
        "A model whose variables hold nothing is left out of the next scope's.",
        lambda: any(
            probes.mentions(probes.module(cls.__module__), "uninitialized_variables")
            for cls in keras.Variable.__mro__
        ),
    ),
    PrivateName(
        "PythonState._trackable_children",
        LAYERS,
        "Compiled functions read the scaling, which no checkpoint would hold.",
        lambda: hasattr(
            probes.module("tensorflow").train.experimental.PythonState,
            "_trackable_children",
        ),
        "TensorFlow",
    ),
    PrivateName(
        "Variable._trainable",
        MODELS,
        "A kernel that was made while it was frozen trains after `merge_lora`.",
        probes.can_unfreeze_variable,
        "TensorFlow",
    ),
    PrivateName(
        "Graph._get_control_flow_context, outer_graph",
        IN_FUNCTIONS,
        "Nothing public tells what XLA compiles.",
        probes.detects_xla,
        "TensorFlow",
    ),
    PrivateName(
        "Module._modules",
        MODELS,
        "The public `named_children` leaves out second names.",
        probes.has("_modules"),
        "torch",
    ),
    PrivateName(
        "Tracer._trace, jax.extend.core: set_current_trace",
        DROPOUT,
        "A function under `keras.remat` cannot write a seed into a generator.",
        probes.traces_can_be_set,
        "JAX",
    ),
    PrivateName(
        "distributed: global_state",
        PROCESSES,
        "JAX's public collectives wait forever for a missing process.",
        probes.processes_can_meet,
        "JAX",
    ),
    PrivateName(
        probes.CONVERTERS,
        HUB,
        "Nothing public tells which tensor of transformers a variable is.",
        probes.converters_are_there,
        "KerasHub",
    ),
]


def probe():
    """Runs all probes; raises ImportError if a name that all layers need is missing."""
    version, oldest = (x.split(".")[:2] for x in (keras.__version__, probes.OLDEST))
    if list(map(int, version)) < list(map(int, oldest)):
        raise ImportError(
            f"keras_lora needs Keras {probes.OLDEST} or later, and Keras "
            f"{keras.__version__} is installed. It was tested with Keras "
            f"{probes.TESTED['Keras']}."
        )
    probe_package("Keras")
    for package, name in probes.MODULES.items():
        if name == keras.backend.backend():
            probe_package(package)
    if LAYERS in probes.MISSING:
        raise ImportError(probes.sentence(LAYERS))


def probe_package(package):
    for row in TABLE:
        if row.package != package:
            continue
        try:
            is_there = row.is_there()
        except Exception:  # whatever another version raises
            is_there = False
        if not is_there:
            probes.MISSING.setdefault(row.needed_by, []).append(row)


probe()
