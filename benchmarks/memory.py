"""Peak memory of a whole process, one variant per process."""

import subprocess
import sys

from benchmarks.timing import Ratio

PROGRAM = """
import re, sys
import keras
from benchmarks.training import *
variant, width, rows, rank = sys.argv[1], *map(int, sys.argv[2:])
def plain():
    return [keras.layers.Dense(width, use_bias=False) for _ in range(6)]
def adapted():
    return [keras_lora.LoRADense(width, rank=rank, use_bias=False) for _ in range(6)]
def peak():
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])
before = peak()
make = adapted if variant == "keras_lora" else plain
model = network((width,), make, frozen=variant in ("floor", "control"))
if variant == "Keras enable_lora":
    for layer in model.layers[2:]:
        layer.enable_lora(rank)
step = keras_step(model, normal(rows, width), normal(rows, width))
for _ in range(4):
    step()
print(peak() - before)
"""


def dense(width, rows, rank, rounds):
    grown = {}
    names = ("floor", "control", "keras_lora", "Keras enable_lora", "full fine-tuning")
    for name in names:
        arguments = [name, str(width), str(rows), str(rank)]
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        grown[name] = int(run.stdout.split()[-1])
    floor = grown["floor"]
    return {name: Ratio(*[size / floor] * 4) for name, size in grown.items()}
