"""The factors of an adapter by module, with their ranks and alphas, without a model."""

import dataclasses
import math
import warnings

import numpy as np

from keras_lora.files import disk, experts, slices
from keras_lora.files.checked_config import checked_config, checked_rows, take_rows
from keras_lora.files.config import CONFIG, check_targets, value_of
from keras_lora.layers import settings, torch_layout
from keras_lora.models import tables


@dataclasses.dataclass(frozen=True)
class Factors:
    """A, B and the other arrays and settings of one module of a file."""

    module: str
    tensors: dict  # suffix -> array
    rank: int
    alpha: float
    use_rslora: bool
    parameter: str | None  # the one that PEFT adapts, if the module has several

    @property
    def scaling(self) -> float:
        """The factor in front of B @ A."""
        return self.alpha / settings.divisor(self.rank, self.use_rslora)

    @property
    def low_rank(self) -> tuple:
        """The suffixes of A and B; none where a method has other factors."""
        both = (torch_layout.LINEAR, torch_layout.EMBEDDING)
        return next((pair for pair in both if pair[0] in self.tensors), ())

    @property
    def more(self) -> list:
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
        rank = self.rank
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
    others: dict  # key -> array, for weights that trained in full
    unadapted: dict  # slice of an adapted module -> {suffix: array}, without A and B
    config: dict  # checked
    rows: dict  # module -> (ids of tokens, their rows)

    @property
    def bias(self) -> str:
        return self.config["bias"]

    @property
    def use_rslora(self) -> bool:
        return self.config["use_rslora"]

    @property
    def method(self) -> dict:
        """The keyword of a method other than LoRA."""
        return self.config["method"]


def slice_names(adapters) -> list:
    """Names of the slices of modules in these adapters."""
    counts = {m: len(r) for adapter in adapters for m, r in adapter.slices.items()}
    return [
        name for module, n in counts.items() for name in slices.slices_of(module, n)
    ]


def assert_finite(name, values):
    if not np.isfinite(values).all():
        raise ValueError(f"The tensor {name!r} holds values that are not finite.")


def factors_of(adapter, modules=None) -> FileFactors:
    """Reads an adapter's tensors and settings, module by module.

    modules: Names that may mean slices, as in `keras_lora.files.slices`; by default
        those of the slices that the adapter itself has.
    """
    config = checked_config(adapter.config)
    modules = slice_names([adapter]) if modules is None else modules
    tensors = dict(adapter.tensors)
    for key, value in tensors.items():
        assert_finite(key, value)
    shares = slices.split(tensors, modules, adapter.slices)
    factors, others = {}, {}
    method = torch_layout.method_in(config["method"])
    known = (*torch_layout.LINEAR, *torch_layout.EMBEDDING, *method.more_suffixes)
    for name, value in tensors.items():
        suffix = next((s for s in known if name.endswith(s)), None)
        if suffix is None:
            others[name] = value
        else:
            factors.setdefault(name.removesuffix(suffix), {})[suffix] = value
    rows = take_rows(others)
    if not factors and not rows:
        keys = ", ".join(map(repr, [*tensors][:3])) or "nothing"
        raise ValueError(
            f"{disk.TENSORS} holds no factors of an adapter (tensors named lora_A and "
            f"lora_B), but {keys}. To turn the kernels of a whole model into an "
            "adapter, use extract_adapter(base, tuned, rank)."
        )
    fused = {slices.without_slice(name) for name in shares}
    unadapted = {
        name: factors.pop(name)
        for name in [name for name in factors if name not in shares]
        if name != slices.without_slice(name) and slices.without_slice(name) in fused
    }
    for module, pair in factors.items():
        expected = [
            set(method.suffixes_for(kind))
            for kind in (torch_layout.LINEAR, torch_layout.EMBEDDING)
        ]
        if set(pair) not in expected:
            raise ValueError(
                f"The adapter of {module!r} needs A and B, as {sorted(expected[0])}; "
                f"the file has {sorted(pair)}."
            )
    if factors:
        check_targets(config, factors)
    ranks = value_of(config, "rank_pattern", "r", factors)
    alphas = value_of(config, "alpha_pattern", "lora_alpha", factors)
    for module, pair in factors.items():
        low_rank = [
            pair[suffix]
            for suffix in torch_layout.LINEAR + torch_layout.EMBEDDING
            if suffix in pair
        ]
        if any(x.ndim < 2 or ranks[module] > x.size for x in low_rank):
            shapes = [value.shape for value in pair.values()]
            raise ValueError(
                f"{module!r} has rank {ranks[module]} in {CONFIG}, but factors of "
                f"shapes {shapes}."
            )
    for module, (rank, total) in shares.items():
        if ranks[module] != total:
            raise ValueError(
                f"The rank of {slices.without_slice(module)!r} is {ranks[module]} in "
                f"{CONFIG}, but {total} in {disk.TENSORS}."
            )
        ranks[module] = rank
        alphas[module] = settings.alpha_at(
            rank, alphas[module], total, config["use_rslora"]
        )
    parameters = experts.parameters_in(factors, config["target_parameters"])
    modules = {
        name: Factors(
            name,
            pair,
            ranks[name],
            alphas[name],
            config["use_rslora"],
            parameters.get(name),
        )
        for name, pair in factors.items()
    }
    rows = checked_rows(rows, config["tokens"])
    return FileFactors(modules, others, unadapted, config, rows)


def checked_starts(starts, factors):
    for module in starts:
        if module not in factors or factors[module].rank % 2:
            raise ValueError(
                f"The file has initial values for {module!r}, but no factors of an "
                "even rank. Load it with the same `names` with which it was saved."
            )
    return starts


def quiet_factors(adapter):
    """`factors_of` without its warnings, which were given when the file was read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return factors_of(adapter)


def parts_of(adapter, most=math.inf):
    """Title, head, rows and lines below, as a `Table` has them.

    most: the largest number of rows.
    """
    try:
        file = quiet_factors(adapter)
    except ValueError as error:  # printing must not raise
        return "Adapter", ["module"], [], [f"It cannot be loaded: {error}"]
    head = ["module", "A, B", "rank", "alpha", "parameters", "size"]
    head += ["error"] if adapter.errors else []
    rows = []
    for module in tables.in_order(file.factors)[: min(most, len(file.factors))]:
        found = file.factors[module]
        shapes = [found.tensors[x].shape for x in (*found.low_rank, *found.more)]
        row = [
            module,
            " ".join(map(str, shapes)),
            f"{found.rank}",
            f"{found.alpha:g}",
            f"{found.size:,}",
            size(found.tensors.values()),
        ]
        if adapter.errors:
            row.append(f"{adapter.errors.get(module, 0):.2g}")
        rows.append(row)
    more = len(file.factors) - len(rows)
    lines = [f"and {tables.counted(more, 'module')} more"] if more else []
    return "Adapter", head, rows, [*lines, *totals(adapter, file)]


def totals(adapter, file):
    """The lines below the rows."""
    method = ", ".join(["LoRA", *file.method])
    lines = [f"{method}: {in_words(adapter)}"]
    if file.others:
        sizes = sum(value.size for value in file.others.values())
        names = ", ".join(tables.in_order(file.others))
        lines.append(f"In full, {tables.counted(sizes, 'parameter')}: {names}")
    if file.rows:
        count = sum(len(ids) for ids, _ in file.rows.values())
        names = ", ".join(tables.in_order(file.rows))
        lines.append(f"{tables.counted(count, 'row')} of {names}")
    return lines


def in_words(adapter):
    """1 module, rank 8, alpha 16, 1,234 parameters, 4.9 kB."""
    try:
        file = quiet_factors(adapter)
    except ValueError:
        return (
            f"{tables.counted(len(adapter.tensors), 'tensor')}, which cannot be loaded"
        )
    parameters = sum(value.size for value in adapter.tensors.values())
    errors = adapter.errors.values()
    return ", ".join(
        [
            tables.counted(len(file.factors), "module"),
            f"rank {reach([x.rank for x in file.factors.values()])}",
            f"alpha {reach([x.alpha for x in file.factors.values()])}",
            tables.counted(parameters, "parameter"),
            size(adapter.tensors.values()),
            *([f"errors up to {max(errors):.2g}"] if errors else []),
        ]
    )


def reach(values):
    low, high = (f"{bound(values):g}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def size(arrays):
    return tables.in_bytes(sum(value.nbytes for value in arrays))
