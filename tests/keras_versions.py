"""The laws on each version of Keras that is supported, and on each backend.

    python tests/keras_versions.py                      writes docs/compatibility.md
    python tests/keras_versions.py "3.16 nightly" jax   only some, writes nothing

Each version is installed into a folder of its own, which is removed again. KerasHub
0.32 does not import with Keras's nightly, so that its own comes along.
"""

import datetime
import os
import re
import subprocess
import sys
import tempfile

from page_sections import write_section

from keras_lora.keras_internals.probes import HUB_NIGHTLY, NIGHTLY, OLDEST

VERSIONS = {
    OLDEST: [f"keras=={OLDEST}.*"],
    "3.15": ["keras==3.15.*"],
    "3.16 nightly": [
        f"keras-nightly=={NIGHTLY}",
        f"keras-hub-nightly=={HUB_NIGHTLY}",
    ],
}
BACKENDS = ("tensorflow", "jax", "torch")
FILES = ("laws", "merging")
TITLE = "## Versions of Keras"
NOTES = """\
Tests that passed of those in {files}, by version of Keras and backend: one of the
half-precision policies, and the smaller models. Written by
`python tests/keras_versions.py`.

| Keras | backend | passed | failed | skipped | on |
|---|---|---:|---:|---:|---|
"""


def counts(version, backend) -> list:
    """The version that ran, and how many tests passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*install, "--target", folder, *VERSIONS[version]], check=True)
        more = os.environ.get("PYTHONPATH", "")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, more]),
            "KERAS_BACKEND": backend,
        }
        command = [sys.executable, "-c", "import keras; print(keras.__version__)"]
        exact = run(command, environment).splitlines()[-1]
        fewer = "(not float16 or mixed_bfloat16) and not transformer"
        files = [f"tests/test_{name}.py" for name in FILES]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-k", fewer]
        printed = run([*command, *files], environment)
    print(printed[-2000:], flush=True)
    words = ("passed", "failed|error", "skipped")
    last = printed.splitlines()[-1]
    numbers = [re.findall(rf"(\d+) (?:{word})", last) for word in words]
    return [exact, *(sum(map(int, number)) for number in numbers)]


def run(command, environment) -> str:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def main():
    lines, only = [], sys.argv[1:]
    for version in VERSIONS:
        for backend in BACKENDS:
            if not only or {version, backend} >= set(only):
                exact, *numbers = counts(version, backend)
                today = datetime.date.today().isoformat()
                cells = [exact, backend, *numbers, today]
                lines.append(f"| {' | '.join(map(str, cells))} |")
                print(lines[-1], flush=True)
    if not only:
        files = ", ".join(f"test_{name}.py" for name in FILES)
        write_section(TITLE, NOTES.format(files=files) + "\n".join(lines))


if __name__ == "__main__":
    main()
