"""Finds the layers that a rule means; a rule that matches nothing is an error."""

import difflib
import functools
import inspect
import re

import keras

from keras_lora.keras_internals import calls
from keras_lora.layers import kinds

# Layers without a kernel that may stand between the last kernel and the outputs.
PASS_THROUGH = (
    keras.layers.Activation,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.Permute,
    keras.layers.Reshape,
    keras.layers.ReLU,
    keras.layers.Softmax,
)


def matching_paths(rule, paths, argument, suggested=None):
    """Returns the paths that a rule means, in the model's order.

    Args:
        rule: A string is a regular expression for the whole path; a class means
            its instances; a function is called with (path, layer); a list or
            tuple holds paths, ends of paths, names of layers, or classes.
        paths: Path -> layer or weight, for the whole model.
        argument: The argument's name, for errors.
        suggested: The paths that errors suggest, by default all.

    Raises:
        ValueError: If the rule, or an entry of a list, matches no layer.
    """
    suggested = paths if suggested is None else suggested
    if isinstance(rule, str):
        matches = {p for p in paths if compile_rule(rule, argument).fullmatch(p)}
        refuse_two_meanings(rule, matches, paths, argument)
        return order_matches(matches, paths, rule, argument, suggested)
    if isinstance(rule, type):
        matches = {p for p, layer in paths.items() if isinstance(layer, rule)}
        return order_matches(matches, paths, rule.__name__, argument, suggested)
    if isinstance(rule, keras.layers.Layer):
        raise ValueError(
            f"`{argument}` contains the layer object {rule.name!r}: give the layer's "
            "path, name or class."
        )
    if callable(rule):
        refuse_wrong_signature(rule, argument)
        matches = {path for path, x in paths.items() if rule(path, kinds.layer_of(x))}
        return order_matches(matches, paths, rule, argument, suggested)
    if not isinstance(rule, (list, tuple, set, frozenset)) or not rule:
        raise ValueError(
            f"`{argument}` must be a regular expression, a list of names, a layer "
            f"class or a function of (path, layer). Received: {rule!r}."
        )
    matches = set()
    for entry in rule:
        if isinstance(entry, str):
            named = match_entry(entry, paths, argument)
            matches |= {*order_matches(named, paths, entry, argument, suggested)}
        else:
            matches |= {*matching_paths(entry, paths, argument, suggested)}
    return [path for path in paths if path in matches]


def match_entry(entry, paths, argument):
    """Paths that equal an entry, end with it, or whose layers have that name."""
    end = entry.replace(".", "/")
    hits = {p for p in paths if p == end or p.endswith(f"/{end}")}
    refuse_two_meanings(entry, hits, paths, argument)
    return hits | {p for p, layer in paths.items() if layer.name == entry}


def refuse_two_meanings(word, by_pattern, paths, argument):
    """Raises if a word is the path of one layer and the name of another.

    Automatic names count instances in the process, paths those in the model.

    Args:
        word: The user's word.
        by_pattern: The paths that it matches as a path or as a regular expression.
        paths: Path -> layer.
        argument: The argument's name.
    """
    called = {path for path, layer in paths.items() if layer.name == word}
    if by_pattern and called - by_pattern:
        by_path, by_name = sorted(by_pattern)[0], sorted(called - by_pattern)[0]
        raise ValueError(
            f"`{argument}` {word!r} means two layers: it is the path of the one at "
            f"{by_path!r}, called {paths[by_path].name!r}, and the name of the one at "
            f"{by_name!r}. For the latter give {by_name!r}. For the former give a "
            f"function, lambda path, layer: path == {by_path!r}, or name the layers "
            "when you make them. `keras_lora.summary` shows paths."
        )


def refuse_wrong_signature(rule, argument):
    try:
        signature = inspect.signature(rule)
    except ValueError:  # a function that is not written in Python
        return
    try:
        signature.bind("path", None)
    except TypeError as error:
        raise ValueError(
            f"`{argument}` must be a function of (path, layer). Received one of "
            f"{signature}."
        ) from error


def order_matches(matches, paths, rule, argument, suggested):
    if not matches:
        words = ["all-linear"] if argument == "target" else []
        what = hint(rule, suggested, words)
        raise ValueError(f"`{argument}` {rule!r} matches no layer. {what}")
    return [path for path in paths if path in matches]


def hint(rule, paths, words=()):
    """Returns a sentence that suggests paths close to a rule.

    words: Other words that a rule can be.
    """
    if rule == "all-linear":
        return 'It stands alone, not in a list: target="all-linear".'
    called = [path for path, layer in paths.items() if layer.name == rule]
    if called:
        return (
            f"The layer of that name has the path {called[0]!r}. A string is a regular "
            f"expression for a whole path; give a list for a name: [{rule!r}]."
        )
    ends = [path.rsplit("/", 1)[-1] for path in paths]
    names = dict.fromkeys([*words, *ends, *paths])  # an end may be a path too
    close = difflib.get_close_matches(str(rule), names, n=5, cutoff=0.5)
    if close:
        return f"Did you mean {', '.join(map(repr, close))}?"
    examples = ", ".join(map(repr, list(paths)[:8]))
    return f"There are: {examples}{', ...' if len(paths) > 8 else '.'}"


def pattern_values(pattern, paths, argument) -> dict:
    """Path -> value of the first key that matches, as in PEFT's patterns.

    A key is a regular expression for one or more last parts of a path.
    """
    pattern = {} if pattern is None else pattern
    if not isinstance(pattern, dict):
        raise ValueError(f"`{argument}` must be a dict. Received: {pattern!r}.")
    if not all(isinstance(key, str) for key in pattern):
        raise ValueError(
            f"The keys of `{argument}` must be strings, regular expressions for ends "
            f"of paths. Received: {pattern!r}."
        )
    rules = {
        key: compile_rule(rf"(.*/)?({key.replace(chr(92) + '.', '/')})", argument)
        for key in pattern
    }
    for key, rule in rules.items():
        means = {path for path in paths if rule.fullmatch(path)}
        refuse_two_meanings(key, means, paths, argument)
    values, used = {}, set()
    for path, site in paths.items():
        means = {path, path.removesuffix(f"/{getattr(site, 'weight_name', '')}")}
        for key, rule in rules.items():
            if any(map(rule.fullmatch, means)):
                values.setdefault(path, pattern[key])
                used.add(key)
    for key in pattern:
        if key not in used:
            raise ValueError(
                f"`{argument}` key {key!r} matches no adapted layer. {hint(key, paths)}"
            )
    return values


def compile_rule(rule, argument):
    try:
        return re.compile(rule)
    except re.error as error:
        raise ValueError(
            f"`{argument}` {rule!r} is not a regular expression: {error}."
        ) from error


def output_layers(model):
    """Ids of the layers that make the model's outputs, if its graph shows them."""
    ids = set()
    for output in keras.tree.flatten(getattr(model, "outputs", None) or []):
        ids |= _makers(output, model)
    return ids


def _makers(tensor, model):
    operation, inputs = calls.operation_of(tensor)
    inner = getattr(operation, "outputs", None)
    if isinstance(operation, keras.Model) and inner:
        return {id(operation)} | output_layers(operation)
    if isinstance(operation, PASS_THROUGH):
        return set().union(*(_makers(t, model) for t in inputs))
    return {id(operation)}


def output_layers_of_call(model, layers):
    """Ids of those of the layers whose outputs a subclassed model returns.

    Its `call` is traced symbolically, as Keras builds a model: what it would assign is
    dropped, and no layer gets a node. Empty if that fails, for example for want of
    the inputs' shapes, or if what the model returns was made by other operations.
    """
    makers, returned = {}, []  # id of a tensor -> it, and the layer that made it

    def watched(layer, call):
        @functools.wraps(call)
        def run(*args, **kwargs):
            outputs = call(*args, **kwargs)
            before = makers.get(id(args[0])) if args else None
            maker = before[1] if before and isinstance(layer, PASS_THROUGH) else layer
            for x in keras.tree.flatten(outputs):
                if layer is model:
                    returned.append(x)
                else:  # the innermost layer comes first
                    makers.setdefault(id(x), (x, maker))
            return outputs

        return run

    layers = [layer for layer in (model, *layers) if "call" not in vars(layer)]
    try:
        shapes = model.get_build_config()["input_shape"]
        shapes = dict(shapes) if isinstance(shapes, dict) else shapes
        inputs = keras.tree.map_shape_structure(keras.KerasTensor, shapes)
        for layer in layers:
            vars(layer)["call"] = watched(layer, layer.call)
        model.compute_output_spec(inputs)
    except Exception:
        return set()
    finally:
        for layer in layers:
            vars(layer).pop("call", None)
    return {id(makers[id(x)][1]) for x in returned if id(x) in makers}
