"""Writes keras_lora/__init__.pyi: the face, as editors and type checkers see it.

A LoRA layer's arguments are those of its Keras layer and those of LoRA, which is known
when its class is made and not before. So they are written down for static tools.

    python tests/typed_face.py
"""

import ast
import inspect
from pathlib import Path

import keras

import keras_lora

FACE = Path(__file__).parents[1] / "keras_lora" / "__init__.py"
HEAD = '''"""The public names, with all arguments of the layers, as Keras {} has them.

Written by tests/typed_face.py.
"""

'''


def is_kind(value):
    return inspect.isclass(value) and "plain_class" in vars(value) and value.plain_class


def stub() -> str:
    face = FACE.read_text()
    kinds = [name for name in keras_lora.__all__ if is_kind(vars(keras_lora)[name])]
    imports = [
        f"from {node.module} import {alias.name}"
        + (f" as _{alias.name}" if alias.name in kinds else "")
        for node in ast.walk(ast.parse(face))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    names = face[face.index("\n__all__ = ") + 1 :]
    version = keras.__version__.rsplit(".", 1)[0]
    lines = [*imports, "", "__version__: str", "", names.rstrip()]
    for name in kinds:
        lines += ["", *constructor(name)]
    return HEAD.format(version) + "\n".join(lines) + "\n"


def constructor(name) -> list:
    """The lines of a class that has its constructor."""
    parameters = list(inspect.signature(vars(keras_lora)[name]).parameters.values())
    shown = ["self"]
    for index, parameter in enumerate(parameters):
        if parameter.kind == parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        is_last = index == len(parameters) - 1
        shown.append(f"**{parameter.name}" if is_last else str(parameter))
    body = [f"        {parameter},".replace("'", '"') for parameter in shown]
    return [
        f"class {name}(_{name}):",
        "    def __init__(",
        *body,
        "    ) -> None: ...",
    ]


if __name__ == "__main__":
    FACE.with_suffix(".pyi").write_text(stub())
