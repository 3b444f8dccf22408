"""The notebooks of the examples are what their scripts give, and all of it."""

import ast
import json
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import notebooks  # noqa: E402

sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize("script", notebooks.SCRIPTS, ids=lambda path: path.stem)
def test_it_is_what_the_script_gives(script):
    found = script.with_suffix(".ipynb").read_text()
    given = notebooks.notebook(script.read_text())
    assert given == found, "run `python examples/notebooks.py`"


@pytest.mark.parametrize("script", notebooks.SCRIPTS, ids=lambda path: path.stem)
def test_it_has_every_statement(script):
    """In the script's order: those of `main` in place of `main`, and no output."""
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    install, *code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "pip" in "".join(install["source"])
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    found = [ast.dump(x) for c in code for x in ast.parse("".join(c["source"])).body]
    _, *top, main, run = ast.parse(script.read_text()).body
    assert main.name == "main" and isinstance(run, ast.If)
    assert found[: len(top)] == [ast.dump(x) for x in top]
    settings = found[len(top) : -len(main.body)]
    assert len(settings) == len(main.args.args)
    for setting, argument in zip(settings, main.args.args, strict=True):
        assert setting.startswith(f"Assign(targets=[Name(id={argument.arg!r}")
    assert found[-len(main.body) :] == [ast.dump(x) for x in main.body]
