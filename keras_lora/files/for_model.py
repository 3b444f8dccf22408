"""What a file holds, under the names of a model's modules."""

import collections
import dataclasses
import difflib
import math

from keras_lora.files.experts import with_stacks
from keras_lora.files.factors import FileFactors
from keras_lora.files.factors import checked_starts
from keras_lora.files.factors import factors_of
from keras_lora.files.factors import low_rank_suffixes
from keras_lora.files.other_formats import module_of
from keras_lora.files.slices import fused_modules
from keras_lora.files.slices import inputs_in_order
from keras_lora.files.slices import outputs_axis
from keras_lora.files.slices import rows_of
from keras_lora.files.slices import slices_of
from keras_lora.files.slices import total_of
from keras_lora.files.slices import without_slice
from keras_lora.layers.kinds import form_of
from keras_lora.layers.kinds import obstacle
from keras_lora.layers.kinds import shape_of
from keras_lora.layers.lora_layer import is_adapted


@dataclasses.dataclass(frozen=True)
class Contents(FileFactors):
    """What a file holds, under the names of a model's modules."""

    modules: dict  # module -> layer, for all of the model
    heads: dict  # module -> layer
    starts: list  # modules whose second half of factors does not train

    @property
    def adapted(self):
        """Module -> site, for those that the file has factors for, in their order."""
        sites = self.modules.sites.items()
        return {module: site for module, site in sites if module in self.factors}

    @property
    def tables(self):
        """Module -> site, for those of which the file has rows."""
        return {module: self.modules.sites[module] for module in self.rows}

    def method_of(self, module):
        """The keywords that the adapter of a layer has."""
        start = {"frozen_start": True} if module in self.starts else {}
        return {**self.method, **start}


def contents(adapter, modules) -> Contents:
    adapter = with_stacks(adapter, modules.parameters)
    found = factors_of(adapter, modules)
    for values in (found.factors, found.ranks, found.alphas):
        for name in [*values]:
            values[module_of(name, modules)] = values.pop(name)
    refuse_unknown_modules(found.factors, modules)
    refuse_unknown_modules(found.rows, modules)
    refuse_ranks_without_values(found.factors, found.ranks, modules)
    file = Contents(
        **vars(found),
        modules=modules,
        heads=heads_of(found.config["modules_to_save"], modules, found.others),
        starts=checked_starts(adapter.starts, found.factors, found.ranks),
    )
    split_others(file)
    return file


def heads_of(names, modules, others):
    """{module: layer} that `modules_to_save` means: by a name or the end of one."""
    heads, slices = {}, collections.defaultdict(list)
    for module in modules:
        slices[without_slice(module)].append(module)
    for name in names:
        meant = [m for m in slices if f".{name}." in f".{m}."]  # or inside of one
        stored = [m for m in meant if any(key.startswith(f"{m}.") for key in others)]
        for module in stored:
            heads |= {part: modules[part] for part in slices[module]}
    if names and not heads:  # PEFT names those of other models too, its "score"
        raise ValueError(
            f"modules_to_save names {', '.join(map(repr, names))}, which is no layer "
            "that the file has tensors for."
        )
    return heads


def split_others(file):
    """Biases and weights of a fused module become those of its slices, in place."""
    for module, count in fused_modules(file.modules).items():
        for key in [key for key in file.others if key.startswith(f"{module}.")]:
            value = file.others.pop(key)
            name = key.split(".")[-1]
            if key.endswith(".base_layer.weight"):
                continue  # PEFT repeats a targeted head
            axis = outputs_axis(value, file.config["fan_in_fan_out"])
            names, places = slices_of(module, count), file.modules.places
            total = total_of(names, value.shape[axis] // count, places)
            if value.shape[axis] != total:
                raise ValueError(
                    f"The tensor {key!r} has shape {value.shape}, which does not "
                    f"divide into {count} slices."
                )
            if value.ndim > 1:
                value = inputs_in_order(value, names, places, 1 - axis, inverse=True)
            for part in names:
                infix = ".base_layer" if part in file.factors else ""
                rows = rows_of(part, total, places)
                file.others[f"{part}{infix}.{name}"] = value.take(rows, axis)


def refuse_unknown_modules(factors, modules):
    for module in factors:
        layer = modules.sites.get(module, modules.get(module))
        if module not in modules.sites or not can_hold(layer):
            able = [m for m, site in modules.sites.items() if can_hold(site)]
            close = difflib.get_close_matches(module, able, n=3, cutoff=0.3)
            hint = f" Close are: {close}." if close else ""
            hint += prefix_between(factors, able)
            raise ValueError(
                f"The file has an adapter for {module!r}, which the model does not have"
                f"{' in a form that can be adapted' if layer is not None else ''}."
                f"{hint} `names` can map paths to modules; for a model of KerasHub and "
                'a file of transformers it is "transformers".'
            )


def prefix_between(factors, able) -> str:
    """A sentence where all modules of a file have a prefix more, or one less.

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
                f" All of the file's modules are the model's behind {prefix!r}: "
                f'names=lambda path: "{prefix}." + path.replace("/", ".").'
            )
        if longer == module and {f"{prefix}.{x}" for x in factors} <= hosts:
            return (
                f" All of the file's modules are the model's without {prefix!r}: "
                f'names=lambda path: path.replace("/", ".").removeprefix("{prefix}.").'
            )
    return ""


def refuse_ranks_without_values(factors, ranks, modules):
    """Refuses ranks without values, so that a small file makes no large factors."""
    for module, pair in factors.items():
        if not low_rank_suffixes(pair):
            continue
        site = modules.sites[module]
        updates = form_of(site, 1).file_rank or 1  # side by side
        form = form_of(site, max(ranks[module] // updates, 1))
        size = sum(value.size for value in pair.values())
        if math.prod(form.a_shape) + math.prod(form.b_shape) > size:
            shapes = " and ".join(str(value.shape) for value in pair.values())
            raise ValueError(
                f"The file's factors of {module!r}, with shapes {shapes}, are smaller "
                f"than rank {ranks[module]} needs for this model's kernel of shape "
                f"{shape_of(site)}: the adapter is of another model."
            )


def can_hold(site):
    return is_adapted(site) or obstacle(site) is None
