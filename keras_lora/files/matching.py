"""Matches the contents of a file with a model: modules, then shapes and values."""

import collections
import dataclasses
import math

import ml_dtypes
import numpy as np

from keras_lora.files import experts, other_formats, tensors
from keras_lora.files.factors import FileFactors, factors_of, validate_starts
from keras_lora.files.names import Modules
from keras_lora.files.slices import without_slice
from keras_lora.keras_internals import layer_state
from keras_lora.layers import arguments, kinds, lora_layer, token_rows, torch_layout
from keras_lora.layers.settings import Settings


@dataclasses.dataclass(frozen=True)
class MatchedFile(FileFactors):
    """A file's arrays, under the names of a model's modules."""

    modules: Modules  # of the whole model
    heads: dict  # module -> layer
    starts: list  # modules whose factors have a second, frozen half

    @property
    def sites(self):
        """Module -> site, for the modules that have factors in the file."""
        sites = self.modules.sites.items()
        return {module: site for module, site in sites if module in self.factors}

    @property
    def tables(self):
        """Module -> site, for the tables that have rows in the file."""
        return {module: self.modules.sites[module] for module in self.rows}

    def settings_of(self, module) -> Settings:
        """The settings of a site's adapter, which can have a lower rank than the file.

        A file has updates side by side, and initial values, as one of a higher rank.
        """
        settings = self.factors[module].settings
        updates = updates_side_by_side(self.modules.sites[module])
        if settings.rank % updates:
            raise ValueError(
                f"The rank of {module!r} is {settings.rank} in the file, which does "
                f"not divide into the {updates} updates of the layer."
            )
        rank = settings.rank // updates
        return settings.with_rank(rank // 2 if module in self.starts else rank)

    def options_of(self, module) -> dict:
        """The arguments of a site's adapter."""
        return {
            **dataclasses.asdict(self.settings_of(module)),
            "dropout": self.config["dropout"],
            **self.method_of(module),
        }

    def method_of(self, module):
        """The keyword of a site's method, and whether it has initial values."""
        start = {"frozen_start": True} if module in self.starts else {}
        return {**self.config["method"], **start}


def match(adapter, modules) -> MatchedFile:
    adapter = experts.stack_experts(adapter, modules.parameters)
    contents = factors_of(adapter, modules.sites, modules.regions)
    for name in [*contents.factors]:
        module = other_formats.module_of(name, modules)
        renamed = dataclasses.replace(contents.factors.pop(name), module=module)
        contents.factors[module] = renamed
    refuse_unknown_modules(contents.factors, modules)
    refuse_unknown_modules(contents.rows, modules)
    refuse_ranks_without_values(contents.factors, modules)
    file = MatchedFile(
        **vars(contents),
        modules=modules,
        heads=heads_of(contents.config["modules_to_save"], modules, contents.weights),
        starts=validate_starts(adapter.starts, contents.factors),
    )
    tensors.split_weights(file)
    return file


def heads_of(names, modules, tensors):
    """{module: layer} for `modules_to_save`: names, or ends of names."""
    heads, parts_of_module = {}, collections.defaultdict(list)
    for module in modules:
        parts_of_module[without_slice(module)].append(module)
    for name in names:
        meant = [
            m for m in parts_of_module if f".{name}." in f".{m}."
        ]  # itself, or what it holds
        stored = [m for m in meant if any(key.startswith(f"{m}.") for key in tensors)]
        for module in stored:
            heads |= {part: modules[part] for part in parts_of_module[module]}
    if names and not heads:  # PEFT also lists heads of other models, such as "score"
        raise ValueError(
            f"modules_to_save in the file has {', '.join(map(repr, names))}, but no "
            "layer of that name in the model has tensors in the file. Map the path of "
            "the layer to that name with `names`."
        )
    return heads


def refuse_unknown_modules(factors, modules):
    for module in factors:
        layer = modules.sites.get(module, modules.get(module))
        if module not in modules.sites or not can_hold(layer):
            able = [m for m, site in modules.sites.items() if can_hold(site)]
            hint = arguments.closest(module, able, cutoff=0.3)
            hint += prefix_between(factors, able)
            raise ValueError(
                f"The file has an adapter for {module!r}, which the model does not have"
                f"{' in a form that can be adapted' if layer is not None else ''}."
                f"{hint} `names` can map paths to modules; for a model of KerasHub and "
                'a file of transformers it is "transformers".'
            )


def prefix_between(factors, able) -> str:
    """A hint if the file's names and the model's differ by one prefix, else "".

    able: the model's modules that can have an adapter.
    """
    first, hosts = min(factors), set(able)
    for module in able:
        longer, shorter = sorted((first, module), key=len, reverse=True)
        prefix = longer.removesuffix(f".{shorter}")
        if prefix == longer:
            continue
        if longer == first and {f"{prefix}.{x}" for x in hosts} >= set(factors):
            return (
                f" The file's names are the model's with {prefix!r} in front: "
                f'names=lambda path: "{prefix}." + path.replace("/", ".").'
            )
        if longer == module and {f"{prefix}.{x}" for x in factors} <= hosts:
            return (
                f" The file's names are the model's without {prefix!r} in front: "
                f'names=lambda path: path.replace("/", ".").removeprefix("{prefix}.").'
            )
    return ""


def refuse_ranks_without_values(factors, modules):
    """Refuses ranks without values, so that a small file cannot make large factors."""
    for module, module_factors in factors.items():
        if not module_factors.low_rank:
            continue
        rank = module_factors.settings.rank
        site = modules.sites[module]
        form = kinds.form_of(site, max(rank // updates_side_by_side(site), 1))
        if math.prod(form.a_shape) + math.prod(form.b_shape) > module_factors.size:
            shapes = " and ".join(str(x.shape) for x in module_factors.tensors.values())
            raise ValueError(
                f"The file's factors of {module!r}, with shapes {shapes}, are smaller "
                f"than rank {rank} needs for this model's kernel of "
                f"shape {kinds.shape_of(site)}: the adapter belongs to another model."
            )


def updates_side_by_side(site) -> int:
    """How many updates of a layer are one in a file: the slices of a merged Dense."""
    return kinds.form_of(site, 1).file_rank or 1


def can_hold(site):
    return lora_layer.is_adapted(site) or kinds.obstacle(site) is None


def refuse_different_modules(file):
    """Raises if the file does not adapt the layers that the model adapts."""
    adapted_sites = {
        m: s for m, s in file.modules.sites.items() if lora_layer.is_adapted(s)
    }
    refuse_different_rows(adapted_sites, file)
    modules = set(file.factors)
    adapted = {m for m, site in adapted_sites.items() if not site.lora.trains_rows}
    if modules != adapted:
        raise ValueError(
            "The file and the model adapt different layers. Only in the model: "
            f"{sorted(adapted - modules)}. Only in the file: "
            f"{sorted(modules - adapted)}. Call remove_lora(model) first, and the "
            "file's adapters are created."
        )
    for module, site in file.sites.items():
        in_file = {word for word, on in file.method_of(module).items() if on}
        in_model = {site.lora.keyword} - {None}
        in_model |= {"frozen_start"} if site.lora.has_start else set()
        if in_model != in_file:
            model_method, file_method = (
                " and ".join(sorted(x)) or "LoRA" for x in (in_model, in_file)
            )
            raise ValueError(
                f"The adapter of {module!r} is {model_method} in the model and "
                f"{file_method} in the file. Call remove_lora(model) first, and the "
                "file's is created."
            )


def refuse_different_rows(sites, file):
    """Raises if the file does not train the rows that the model trains."""
    in_model = {
        m: site.lora.indices for m, site in sites.items() if site.lora.trains_rows
    }
    in_file = {module: ids for module, (ids, _) in file.rows.items()}
    if in_model != in_file:
        raise ValueError(
            f"The model has {token_rows.KEYWORD}={in_model}, but the file has "
            f"{in_file}. Call remove_lora(model) first, and the file's are used."
        )


def refuse_changed_slices(file):
    """Raises if a file changes a slice for which it has no A and B."""
    for module, arrays in file.unadapted.items():
        if module not in file.modules:
            raise ValueError(
                f"`names` maps no layer to {module!r}, which the file has."
            )
        method = torch_layout.method_in(file.config["method"])
        expected = method.of_plain_layer(tensors.kernel_to_tensor(file.modules[module]))
        for suffix, value in arrays.items():
            if value.shape != expected[suffix].shape or not np.allclose(
                value, expected[suffix], rtol=1e-4, atol=0
            ):
                raise ValueError(
                    f"{suffix[1:]} of {module!r}, which has no A and B, would change "
                    "the model's kernel: the file belongs to another base model."
                )


def values_for(file) -> list:
    """[(variable, value)] for the whole file; raises if a shape does not fit."""
    values = [*factor_values(file), *row_values(file)]
    refuse_changed_slices(file)
    values += weight_values(file)
    for variable, value in values:
        limit = float(ml_dtypes.finfo(variable.dtype).max)
        if np.max(np.abs(value), initial=0) > limit:
            raise ValueError(
                f"A value for {variable.path!r} is finite in the file and infinite in "
                f"{variable.dtype}: it is above {limit:.3g}."
            )
    return values


def factor_values(file) -> list:
    values = []
    for module, factors in file.factors.items():
        site = file.sites[module]
        rank, rank_here = factors.settings.rank, site.lora.file_rank
        if rank != rank_here:
            lower = (
                " Or lower the file's rank: combine_adapters([adapter], "
                f"rank={rank_here}) is the nearest adapter of the model's rank."
            )
            raise ValueError(
                f"The rank of {module!r} is {rank} in the file and {rank_here} in the "
                "model. Call remove_lora(model) first, and the file's adapters are "
                f"created.{lower if rank > rank_here else ''}"
            )
        values += tensors.from_tensors(site, factors.tensors, module)
    return values


def row_values(file) -> list:
    values = []
    for module, site in file.tables.items():
        _, rows = file.rows[module]
        expected = tuple(site.lora.rows.shape)
        if rows.shape != expected:
            raise ValueError(
                f"The file has rows of shape {rows.shape} for {module!r}; the model "
                f"needs {expected}."
            )
        values.append((site.lora.rows, rows))
    return values


def weight_values(file) -> list:
    """[(variable, value)] for biases, and for layers that trained in full."""
    variables, values = {}, []
    for module, layer in file.modules.items():
        for variable in layer_state.layer_variables(layer):
            name = tensors.torch_name(layer, variable)
            key = tensors.weight_key(module, name, file.factors)
            variables[key] = layer, variable
            if module in file.heads and key not in file.weights:
                refuse_missing_tensor(layer, key)
    for key, value in file.weights.items():
        if key.endswith(".base_layer.weight"):
            continue  # PEFT repeats a targeted embedding or head
        if key not in variables:
            hint = arguments.closest(key, variables)
            raise ValueError(f"Unexpected tensor {key!r}.{hint}")
        layer, variable = variables[key]
        # A model with transformers' Conv1D may have a Linear head.
        linear = tensors.weight_to_tensor(layer, variable).shape
        is_linear = value.shape == linear and linear != linear[::-1]
        inputs_first = file.config["fan_in_fan_out"] and not is_linear
        value = tensors.weight_from_tensor(layer, variable, value, key, inputs_first)
        values.append((variable, value))
    return values


def refuse_missing_tensor(layer, key):
    hint = ""
    if layer.quantization_mode is not None:
        hint = (
            " The layer is quantized, but the file has its float values, trained in "
            "full: leave it out with `filters` of `Model.quantize`."
        )
    raise ValueError(f"The file has no tensor {key!r}.{hint}")
