"""An einsum equation, split into what a low-rank update needs of it."""

import math
import string
from typing import NamedTuple

from keras import ops


class SplitEquation(NamedTuple):
    """An equation's kernel axes by what they do, and the low-rank equations."""

    inputs: str
    kernel: str
    batch: str
    contracted: str
    new: str
    down: str  # inputs, A -> hidden
    up: str  # hidden, B -> outputs
    compose: str  # A, B -> kernel
    outputs: str
    back: str  # gradient of outputs, kernel -> gradient of inputs

    def axes(self, letters):
        """Where the kernel has these axes."""
        return tuple(map(self.kernel.index, letters))

    def over_outputs(self, value):
        """A value with the kernel's batch and new axes, laid out as the outputs are."""
        own = [axis for axis in self.kernel if axis not in self.contracted]
        lead, _, trail = self.outputs.rpartition("...")
        if any(axis in lead for axis in own):
            raise ValueError(
                f"The kernel's axes of outputs {self.outputs!r} come before '...'."
            )
        value = ops.transpose(value, [own.index(axis) for axis in trail if axis in own])
        for place, axis in enumerate(trail):
            if axis not in own:
                value = ops.expand_dims(value, place)
        return value

    def rows(self, inputs):
        """Inputs as (n, contracted axes as one); None where the kernel is a stack."""
        if self.batch:
            return None
        own = self.inputs.replace("...", "")
        places = [own.index(axis) for axis in self.contracted]
        if "..." in self.inputs:
            first = self.inputs.index("...")
            more = len(inputs.shape) - len(own)
            places = [place + more * (place >= first) for place in places]
        others = [place for place in range(len(inputs.shape)) if place not in places]
        size = math.prod(inputs.shape[place] for place in places)
        return ops.reshape(ops.transpose(inputs, others + places), (-1, size))

    @property
    def keeps_order(self):
        """Whether outputs have the inputs' other axes in their order, then new ones."""
        others = "".join(axis for axis in self.inputs if axis not in self.contracted)
        return not self.batch and self.outputs.startswith(others)

    def by_row(self, ndim):
        """(down, up, letter of the rows), with letters in the place of "..."."""
        free = (x for x in string.ascii_letters if x not in self.down + self.up)
        inputs = self.down.partition(",")[0]
        others = "".join(next(free) for _ in range(ndim - len(inputs) + 3))
        down, up = (x.replace("...", others) for x in (self.down, self.up))
        row = down[0]
        if row in self.kernel:
            raise ValueError(
                f"The first axis of the inputs in {self.down!r} is one of the kernel's "
                "own: rows cannot have adapters of their own."
            )
        return down, up, row

    def over_kernel(self, value, sizes):
        """What lies as the outputs do, with 1 for axes not the kernel's, beside it."""
        size = dict(zip(self.kernel, sizes, strict=True))
        found = [axis for axis in self.outputs if axis in self.kernel]
        value = ops.reshape(value, [size[axis] for axis in found])
        own = [axis for axis in self.kernel if axis in found]
        value = ops.transpose(value, [found.index(axis) for axis in own])
        for place in sorted(self.axes(self.contracted)):
            value = ops.expand_dims(value, place)
        return value


def split_equation(equation):
    """Splits "inputs,kernel->outputs" around a rank axis of its own."""
    operands, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    batch = "".join(x for x in kernel if x in inputs and x in outputs)
    contracted = "".join(x for x in kernel if x in inputs and x not in outputs)
    new = "".join(x for x in kernel if x not in inputs)
    if not contracted or not new:
        missing = "contracts no axis of" if not contracted else "gives no new axis to"
        raise ValueError(
            f"The equation {equation!r} {missing} its kernel, so a low-rank update "
            'has nothing to factor. Use rank=0, or an equation such as "abc,cd->abd".'
        )
    rank = next(x for x in "rzyxwvutsqponmlkjihgfedcbaR" if x not in equation)
    # Output axes that come from the input keep their order, then the rank axis.
    hidden = "".join(x for x in outputs if x not in new) + rank
    a, b = batch + contracted + rank, batch + rank + new
    return SplitEquation(
        inputs,
        kernel,
        batch,
        contracted,
        new,
        down=f"{inputs},{a}->{hidden}",
        up=f"{hidden},{b}->{outputs}",
        compose=f"{a},{b}->{kernel}",
        outputs=outputs,
        back=f"{outputs},{kernel}->{inputs}",
    )


def as_matrix(layer, kernel):
    """The kernel of an einsum layer as (inputs, outputs); a stack of them stays one."""
    split = split_equation(layer.equation)
    if split.batch:
        return kernel
    contracted = split.axes(split.contracted)
    rows = math.prod(kernel.shape[axis] for axis in contracted)
    return kernel.transpose(*contracted, *split.axes(split.new)).reshape(rows, -1)
