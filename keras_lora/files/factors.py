"""The factors of an adapter by module, with their ranks and alphas, without a model."""

import dataclasses

import numpy as np

from keras_lora.files import config, disk, experts, slices, validation
from keras_lora.files.config import CONFIG
from keras_lora.layers import torch_layout
from keras_lora.layers.settings import Settings


@dataclasses.dataclass(frozen=True)
class Factors:
    """A, B and the other arrays and settings of one module of a file."""

    module: str
    tensors: dict  # suffix -> array
    settings: Settings
    parameter: str | None  # the one that PEFT adapts, if the module has several

    @property
    def low_rank(self) -> tuple:
        """The suffixes of A and B; none where a method has other factors."""
        both = (torch_layout.LINEAR, torch_layout.EMBEDDING)
        return next((pair for pair in both if pair[0] in self.tensors), ())

    @property
    def other_suffixes(self) -> list:
        """The suffixes of a method's arrays other than A and B."""
        return sorted(
            self.tensors.keys() - {*torch_layout.LINEAR, *torch_layout.EMBEDDING}
        )

    @property
    def is_stack(self) -> bool:
        """Whether A and B are those of a stack of matrices, one for each expert."""
        return self.parameter is not None and all(
            self.tensors[suffix].ndim == 3 for suffix in self.low_rank
        )

    @property
    def size(self) -> int:
        return sum(value.size for value in self.tensors.values())

    def product(self):
        """B and A as matrices, (out, r) and (r, in), or as stacks of them."""
        if not self.low_rank:
            raise ValueError(
                f"{self.module!r} has no A and B, but {sorted(self.tensors)}."
            )
        a, b = (self.tensors[suffix] for suffix in self.low_rank)
        if self.is_stack:
            return b.transpose(2, 0, 1), a.transpose(1, 0, 2)
        rank = self.settings.rank
        if len(a) != rank or b.shape[1] != rank or b.size != len(b) * rank:
            raise ValueError(
                f"The factors of {self.module!r} have shapes {a.shape} and {b.shape}, "
                f"which are not matrices of rank {rank}: only their layer can multiply "
                'them (a stack of kernels, or factorization="loralib"). Load the '
                "adapter into its model first."
            )
        return b.reshape(len(b), rank), a.reshape(rank, -1)


@dataclasses.dataclass(frozen=True)
class FileFactors:
    """The arrays of a file, grouped by their use."""

    factors: dict  # module -> Factors
    weights: dict  # key -> array, for those that trained in full
    unadapted: dict  # slice of an adapted module -> {suffix: array}, without A and B
    config: dict  # checked, with PEFT's defaults
    rows: dict  # module -> (ids of tokens, their rows)


def slice_names(adapters) -> list:
    """Names of the slices of modules in these adapters."""
    counts = {m: len(r) for adapter in adapters for m, r in adapter.slices.items()}
    return [
        name for module, n in counts.items() for name in slices.slices_of(module, n)
    ]


def refuse_not_finite(name, values):
    if not np.isfinite(values).all():
        raise ValueError(f"The tensor {name!r} holds values that are not finite.")


def factors_of(adapter, names=None, regions=None) -> FileFactors:
    """Reads an adapter's tensors and settings, module by module.

    Args:
        adapter: An `Adapter`.
        names: Names that may mean slices, as in `keras_lora.files.slices`; by default
            those of the slices that the adapter itself has.
        regions: As there.
    """
    checked = validation.validate_config(adapter.config)
    names = slice_names([adapter]) if names is None else names
    tensors = dict(adapter.tensors)
    for key, value in tensors.items():
        refuse_not_finite(key, value)
    shares = slices.split(tensors, names, adapter.slices, regions)
    method = torch_layout.method_in(checked["method"])
    suffixes = torch_layout.LINEAR + torch_layout.EMBEDDING + method.more_suffixes
    arrays, weights = group_by_module(tensors, suffixes)
    rows = validation.take_rows(weights)
    if not arrays and not rows:
        keys = ", ".join(map(repr, [*tensors][:3])) or "nothing"
        raise ValueError(
            f"{disk.TENSORS} holds no factors of an adapter (tensors named lora_A and "
            f"lora_B), but {keys}. To turn the kernels of a whole model into an "
            "adapter, use extract_adapter(base, tuned, rank)."
        )
    fused = {slices.without_slice(name) for name in shares}
    unadapted = {
        name: arrays.pop(name)
        for name in [name for name in arrays if name not in shares]
        if name != slices.without_slice(name) and slices.without_slice(name) in fused
    }
    refuse_incomplete(arrays, method)
    if arrays:
        config.refuse_unmatched_targets(checked, arrays)
    settings = config.settings_by_module(checked, arrays)
    refuse_other_ranks(settings, arrays, shares)
    for name, share in shares.items():
        settings[name] = settings[name].with_rank(share.rank)
    parameters = experts.parameters_in(arrays, checked["target_parameters"])
    factors = {
        module: Factors(module, values, settings[module], parameters.get(module))
        for module, values in arrays.items()
    }
    rows = validation.validate_rows(rows, checked["tokens"])
    return FileFactors(factors, weights, unadapted, checked, rows)


def group_by_module(tensors, suffixes) -> tuple:
    """Returns {module: {suffix: array}}, and the tensors that have no such suffix."""
    arrays, others = {}, {}
    for key, value in tensors.items():
        suffix = next((x for x in suffixes if key.endswith(x)), None)
        if suffix is None:
            others[key] = value
        else:
            arrays.setdefault(key.removesuffix(suffix), {})[suffix] = value
    return arrays, others


def refuse_incomplete(arrays, method):
    """Raises if a module has not all arrays that its method needs."""
    complete = [
        set(method.suffixes_for(kind))
        for kind in (torch_layout.LINEAR, torch_layout.EMBEDDING)
    ]
    for module, values in arrays.items():
        if set(values) not in complete:
            raise ValueError(
                f"The adapter of {module!r} needs A and B, as {sorted(complete[0])}; "
                f"the file has {sorted(values)}."
            )


def refuse_other_ranks(settings, arrays, shares):
    """Raises if the tensors cannot have the ranks of the settings.

    settings: module -> Settings. A slice has those of its module.
    """
    low_rank = torch_layout.LINEAR + torch_layout.EMBEDDING
    for module, values in arrays.items():
        factors = [values[suffix] for suffix in low_rank if suffix in values]
        rank = settings[module].rank
        if any(x.ndim < 2 or rank > x.size for x in factors):
            shapes = [value.shape for value in values.values()]
            raise ValueError(
                f"{module!r} has rank {rank} in {CONFIG}, but factors of "
                f"shapes {shapes}."
            )
    for name, share in shares.items():
        rank = settings[name].rank
        if rank != share.total:
            raise ValueError(
                f"The rank of {slices.without_slice(name)!r} is {rank} in {CONFIG}, "
                f"but {share.total} in {disk.TENSORS}."
            )


def validate_starts(starts, factors):
    for module in starts:
        if module not in factors or factors[module].settings.rank % 2:
            raise ValueError(
                f"The file has initial values for {module!r}, but no factors of an "
                "even rank. Load it with the same `names` with which it was saved."
            )
    return starts
