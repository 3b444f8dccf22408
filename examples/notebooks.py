"""Writes the notebooks of the examples, whose scripts are the only source.

A line `# %% Title` starts a cell: it and the comment below it are text, what follows is
code. The body of `main` becomes cells too, with its arguments' defaults before them;
the last statement, which runs the script, is left out. The first cell of code installs
what the example needs.

    python examples/notebooks.py
"""

import ast
import json
import re
import textwrap
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ["finetune_digits", "adapt_text_model", "adapt_recurrent_model"]
NAMES += ["finetune_quantized", "serve_four_tenants", "compare_methods"]
SCRIPTS = [FOLDER / f"{name}.py" for name in NAMES]
INSTALL = """
# In a clone, whose folder `examples` this notebook is in.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("keras_lora") is None:
    command = [sys.executable, "-m", "pip", "install", "-q", "..[examples]"]
    subprocess.run(command, check=True)
"""
MARK = re.compile(r"^# %% (.+)\n((?:#.*\n)*)", re.MULTILINE)


def notebook(source: str) -> str:
    """A script's notebook, as JSON, without outputs."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    docstring, *_, main, _ = tree.body
    title, text = ast.get_docstring(tree).split("\n", 1)
    top = "".join(lines[docstring.end_lineno : main.lineno - 1])
    body = textwrap.dedent("".join(lines[main.lineno : main.end_lineno]))
    defaults = zip(main.args.args, main.args.defaults, strict=True)
    given = [f"{name.arg} = {ast.unparse(value)}\n" for name, value in defaults]
    settings = f"# %% Settings\n{''.join(given)}\n" if given else "# %% The run\n"
    imports, *parts = MARK.split(f"{top}{settings}{body}")
    cells = [cell("markdown", f"# {title}\n{text}")]
    cells += [cell("code", INSTALL), cell("code", imports)]
    for title, comment, code in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        words = re.sub(r"^# ?", "", comment, flags=re.MULTILINE)
        cells += [cell("markdown", f"## {title}\n\n{words}")]
        cells += [cell("code", code)] if code.strip() else []
    content = {
        "cells": [{**each, "id": f"cell-{n}"} for n, each in enumerate(cells)],
        "metadata": {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def cell(kind, text) -> dict:
    more = {"execution_count": None, "outputs": []} if kind == "code" else {}
    source = text.strip().splitlines(keepends=True)
    return {"cell_type": kind, "metadata": {}, **more, "source": source}


if __name__ == "__main__":
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(notebook(script.read_text()))
