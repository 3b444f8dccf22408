"""Layers of experts: the parameters that PEFT adapts, and stacks of factors.

Since transformers 5, the experts of a layer are one module with two parameters, each a
stack of E matrices. PEFT wraps the module once for each parameter that it adapts, the
first registered one innermost, and writes both factors as matrices. r is the rank of
one expert.

    stack   A (r, E, in)                   B (out, r, E)
    file    lora_A (E*r, in)               lora_B (out, r*E)
            its row e*r + k is A[k, e]     its column k*E + e is B[:, k, e]

    both parameters adapted    experts.base_layer is gate_up_proj, experts is down_proj
    one of them                experts is that one: `target_parameters` says which

Before transformers 5, each expert had its own linear modules, and a file has a pair of
factors for each.
"""

import collections
import dataclasses
import itertools
import re

import numpy as np

from keras_lora.files import config, disk, slices, validation
from keras_lora.layers import torch_layout

PARAMETERS = ("gate_up_proj", "down_proj")  # in the order of registration
OWNER = r"((?:.+\.)?experts)"
STACK = re.compile(rf"{OWNER}\.({'|'.join(PARAMETERS)})")
WRAPPED = re.compile(rf"{OWNER}((?:\.base_layer)*)\.lora_[AB]\.weight")
# Name of an expert's linear module -> the parameter, and which half of it.
HALVES = {
    "w1": "gate_up_proj[0/2]",
    "w3": "gate_up_proj[1/2]",
    "w2": "down_proj",
    "gate_proj": "gate_up_proj[0/2]",
    "up_proj": "gate_up_proj[1/2]",
    "down_proj": "down_proj",
}
EXPERT = re.compile(rf"{OWNER}\.(\d+)\.({'|'.join(HALVES)})")


def parameter_of(module) -> str:
    """Returns PEFT's name of the parameter that is adapted in a module."""
    return module if STACK.fullmatch(module) else f"{module}.weight"


def parameters_in(modules, entries) -> dict:
    """{module: parameter} for the modules that match `target_parameters`."""
    entries, parameters = set(entries), {}
    for module in modules:
        parameter = parameter_of(slices.without_slice(module))
        if not entries.isdisjoint(config.ends_of(parameter)):
            parameters[module] = parameter
    return parameters


def wrapped_modules(owner, parameters) -> dict:
    """{parameter: the module under which a file has it}."""
    adapted = [
        f"{owner}.{name}" for name in PARAMETERS if f"{owner}.{name}" in parameters
    ]
    return {
        parameter: owner + ".base_layer" * depth
        for depth, parameter in enumerate(reversed(adapted))
    }


def unwrap(tensors, file_config) -> dict:
    """The tensors of a file, with stacks under the names of their parameters.

    file_config: From `validate_config`.
    """
    depths = collections.defaultdict(set)
    for key in tensors:
        if match := WRAPPED.fullmatch(key):
            depths[match[1]].add(match[2].count("."))
    names = [f"{owner}.{name}" for owner in depths for name in PARAMETERS]
    meant = parameters_in(names, file_config["target_parameters"])
    ranks = config.values_by_module(
        file_config, "rank_pattern", "r", meant, warns=False
    )
    tensors = dict(tensors)
    for owner, own_depths in depths.items():
        modules = wrapped_modules(owner, meant)
        if modules and own_depths != set(range(len(modules))):
            raise ValueError(
                f"target_parameters means {sorted(modules)}, but {disk.TENSORS} has "
                f"factors for {len(own_depths)} parameters of {owner!r}."
            )
        for parameter, module in modules.items():
            keys = [module + suffix for suffix in torch_layout.LINEAR]
            if not all(key in tensors for key in keys):
                raise ValueError(f"The adapter of {parameter!r} needs A and B.")
            a, b = (tensors.pop(key) for key in keys)
            rank = ranks[parameter]
            if a.ndim != 2 or b.ndim != 2 or len(a) % rank or b.shape[1] != len(a):
                raise ValueError(
                    f"The factors of {parameter!r}, whose rank is {rank} for each "
                    f"expert, must have shapes (experts * {rank}, inputs) and "
                    f"(outputs, {rank} * experts). Received: {a.shape} and {b.shape}."
                )
            a = a.reshape(-1, rank, a.shape[1]).transpose(1, 0, 2)
            b = b.reshape(len(b), rank, -1)
            pair = (parameter + suffix for suffix in torch_layout.LINEAR)
            tensors |= zip(pair, (a, b), strict=True)
    return tensors


def wrap(tensors, entries) -> dict:
    """The tensors for a file, with stacks as PEFT wraps them: the inverse of `unwrap`.

    entries: The file's `target_parameters`.
    """
    stacks = [module for module in linear_modules(tensors) if STACK.fullmatch(module)]
    meant, tensors = parameters_in(stacks, entries), dict(tensors)
    for owner in dict.fromkeys(stack.rpartition(".")[0] for stack in meant):
        for parameter, module in wrapped_modules(owner, meant).items():
            a, b = (tensors.pop(parameter + suffix) for suffix in torch_layout.LINEAR)
            a = a.transpose(1, 0, 2).reshape(-1, a.shape[-1])
            pair = (module + suffix for suffix in torch_layout.LINEAR)
            tensors |= zip(pair, (a, b.reshape(len(b), -1)), strict=True)
    return tensors


def linear_modules(tensors) -> list:
    """The modules for which there is an A, other than embeddings."""
    suffix, _ = torch_layout.LINEAR
    return [key.removesuffix(suffix) for key in tensors if key.endswith(suffix)]


def stack_key(key):
    """Returns the key of the stack for that of one expert, and other keys unchanged."""
    match = EXPERT.match(key)
    if match is None:
        return key
    return f"{match[1]}.{slices.without_slice(HALVES[match[3]])}{key[match.end() :]}"


def stack_experts(adapter, parameters):
    """Converts an adapter with a pair of factors for each expert into one of stacks.

    parameters: The stacks that the model has; other tensors are unchanged.
    """
    owners = {match[1] for x in parameters if (match := STACK.fullmatch(x))}
    stacks = collections.defaultdict(lambda: collections.defaultdict(dict))
    other_tensors = {}
    for key, value in adapter.tensors.items():
        suffix = next((x for x in torch_layout.LINEAR if key.endswith(x)), "")
        module = key.removesuffix(suffix)
        match = EXPERT.match(module)
        if match is None or match[1] not in owners:
            other_tensors[key] = value
        elif not suffix or match[0] != module:
            raise ValueError(
                f"The tensor {key!r} belongs to one expert, for which only A and B are "
                "supported."
            )
        else:
            stack = f"{match[1]}.{HALVES[match[3]]}"
            stacks[stack][module][suffix] = value
    return build_stacks(adapter, other_tensors, stacks) if stacks else adapter


def build_stacks(adapter, tensors, stacks):
    """The second half of `stack_experts`.

    Args:
        adapter: The adapter as it was read.
        tensors: The tensors that belong to no single expert.
        stacks: Half of a stack -> {linear module of an expert: {suffix: value}}.
    """
    in_file = validation.validate_config(adapter.config)
    other_modules = linear_modules(tensors)
    every = [*other_modules, *itertools.chain(*stacks.values())]
    config.refuse_unmatched_targets(in_file, every)
    in_modules = config.settings_by_module(in_file, every)
    settings = {module: in_modules[module] for module in other_modules}
    for stack, modules in stacks.items():
        different = {(x.rank, x.alpha) for x in map(in_modules.get, modules)}
        if len(different) > 1:
            raise ValueError(
                f"The experts of {slices.without_slice(stack)!r} have different ranks "
                f"and alphas, {sorted(different)}; a stack of experts has one for all."
            )
        settings[stack] = in_modules[next(iter(modules))]
        a, b = (sort_by_expert(stack, modules, x) for x in torch_layout.LINEAR)
        tensors[stack + torch_layout.LINEAR[0]] = np.stack(a, 1)
        tensors[stack + torch_layout.LINEAR[1]] = np.stack(b, 2)
    slice_ranks = slices.fuse(tensors, settings)
    names = {slices.without_slice(stack) for stack in stacks}
    changed = {
        "target_modules": sorted(other_modules),
        "target_parameters": sorted({*in_file["target_parameters"], *names}),
        "rank_pattern": config.pattern(settings, "rank", in_file["r"]),
        "alpha_pattern": config.pattern(settings, "alpha", in_file["lora_alpha"]),
    }
    return dataclasses.replace(
        adapter,
        tensors=tensors,
        config=adapter.config | changed,
        slices=adapter.slices | slice_ranks,
    )


def sort_by_expert(stack, modules, suffix):
    """The arrays of all experts with a suffix, by the experts' numbers."""
    values = {
        int(EXPERT.match(module)[2]): arrays[suffix]
        for module, arrays in modules.items()
        if suffix in arrays
    }
    shapes = {value.shape for value in values.values()}
    is_complete = values.keys() == set(range(len(values)))
    if not is_complete or [len(shape) for shape in shapes] != [2]:
        raise ValueError(
            f"The experts of {slices.without_slice(stack)!r} need factors of one shape "
            f"each. The file has factors of the experts {sorted(values)[:9]}, with "
            f"shapes {sorted(shapes)[:3]}."
        )
    return [values[expert] for expert in range(len(values))]
