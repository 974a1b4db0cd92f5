"""What the axes of a leaf are in the product that uses it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the axes of a leaf are in the product that uses it.

    Methods see a leaf as (batch..., window..., inputs, outputs), the inputs that the product sums over as axis -2 and
    its outputs as axis -1, whatever order the leaf itself keeps them in: ``compress`` lays it out, and brings the node
    back. ``jc.trace.layout`` reads layouts off a function, ``calibrate`` puts them into its statistics, and
    ``jc.plan(params, rules, layout=...)`` takes either, or those written by hand. Without one a leaf is (in, out), a
    convolution kernel (window..., in, out).

    Together the fields name the last axes of the leaf, each once, as negative numbers or from the front; axes before
    those are stacked layers. An axis may be given as a number, several as a tuple, whose order counts.

    Attributes:
      inputs: contracted axes; flattened into one where there are several, as (heads, head_dim).
      outputs: axes of the output; flattened into one.
      batch: axes of which each index has a product of its own: experts, layers stacked for ``jax.lax.scan``.
      window: spatial axes of a convolution kernel. They are contracted too, and stay apart from the inputs.
      groups: of a grouped convolution, whose output axis is (groups, outputs of each group): each has a product of its
        own.

    Raises:
      ValueError: for axes that are named twice or left out, or groups beside several output axes.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"weight": jnp.array([[1.0, 2.0], [30.0, 70.0]])}  # (out, in)
      >>> rules = [("weight", jc.quantize.Int(bits=4))]
      >>> jc.compress(params, jc.plan(params, rules, layout={"weight": jc.Layout(inputs=1, outputs=0)}))["weight"].scale
      Array([[ 0.2857143],
             [10.       ]], dtype=float32)
      >>> jc.Layout(outputs=0, inputs=1, window=(2, 3))  # of a convolution kernel in the layout OIHW
      Layout(inputs=(-3,), outputs=(-4,), window=(-2, -1))
    """

    inputs: Any = (-2,)
    outputs: Any = (-1,)
    batch: Any = ()
    window: Any = ()
    groups: int = 1

    def __post_init__(self) -> None:
        given = {name: _tuple(getattr(self, name)) for name in ("inputs", "outputs", "batch", "window")}
        ndim = sum(map(len, given.values()))
        for name, axes in given.items():
            object.__setattr__(self, name, tuple(a - ndim if a >= 0 else a for a in axes))
        named = [a for name in given for a in getattr(self, name)]
        if sorted(named) != list(range(-ndim, 0)) or not self.inputs or not self.outputs:
            raise ValueError(
                f"{self!r}: found axes {sorted(named)}, expected inputs, outputs, batch and window to name the last "
                f"{ndim} axes of a leaf, each once, with at least one input and one output"
            )
        if self.groups < 1 or (self.groups > 1 and len(self.outputs) > 1):
            raise ValueError(f"{self!r}: found {self.groups} groups and {len(self.outputs)} output axes, expected one")

    def __repr__(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        shown = ("inputs", "outputs", *(name for name, x in fields.items() if x not in ((), 1)))
        return f"Layout({', '.join(f'{name}={fields[name]}' for name in dict.fromkeys(shown))})"

    @property
    def ndim(self) -> int:
        """How many axes are named."""
        return sum(len(x) for x in (self.batch, self.window, self.inputs, self.outputs))

    @property
    def contracted(self) -> Axes:
        """The axes that the product sums over, rising: window and inputs."""
        return tuple(sorted((*self.window, *self.inputs)))

    @property
    def order(self) -> Axes:
        """The named axes in the order in which methods see them."""
        return (*self.batch, *self.window, *self.inputs, *self.outputs)

    def lead(self, ndim: int) -> int:
        """How many leading axes a method sees that have a product each, in a leaf of ``ndim`` axes."""
        return ndim - self.ndim + len(self.batch) + (self.groups > 1)

    @property
    def plain(self) -> bool:
        """Whether methods see the leaf as it is."""
        single = len(self.inputs) == len(self.outputs) == self.groups == 1
        return single and self.order == tuple(range(-self.ndim, 0))

    @property
    def leading(self) -> int:
        """How many of the named axes are batch axes that stand in front, in order, and so are as good as unnamed."""
        count = 0
        while self.batch[count : count + 1] == (count - self.ndim,):
            count += 1
        return count

    def inner(self) -> Layout:
        """The same without the batch axes that stand in front, so that it serves a layer of the stack too."""
        return dataclasses.replace(self, batch=self.batch[self.leading :])

    def check(self, path: str, shape: Sequence[int]) -> None:
        """Raise if a leaf of this shape cannot have the layout."""
        if len(shape) < self.ndim:
            raise ValueError(
                f"{path}: found shape {tuple(shape)}, and {self} names {self.ndim} axes; name those it has"
            )
        if self.groups > 1 and shape[self.outputs[0]] % self.groups:
            raise ValueError(
                f"{path}: found {shape[self.outputs[0]]} outputs for {self.groups} groups in shape {tuple(shape)}, "
                "expected a multiple"
            )

    def seen(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that methods see of a leaf of some shape."""
        outputs = math.prod(shape[a] for a in self.outputs)
        groups = (self.groups,) if self.groups > 1 else ()
        batch = (*shape[: len(shape) - self.ndim], *(shape[a] for a in self.batch), *groups)
        window, inputs = (shape[a] for a in self.window), math.prod(shape[a] for a in self.inputs)
        return (*batch, *window, inputs, outputs // self.groups)

    def arrange(self, x: Any) -> Any:
        """An array of the leaf's shape, as methods see it. Axes of length 1 that are to broadcast stay so."""
        if self.plain:
            return x
        front = x.ndim - self.ndim
        groups, outputs = self.groups, [x.shape[a] for a in self.outputs]
        if groups > 1:
            outputs = [1, 1] if outputs == [1] else [groups, outputs[0] // groups]
        kept = [x.shape[a] for a in (*self.batch, *self.window)]
        inputs = [x.shape[a] for a in self.inputs]
        x = x.transpose(*range(front), *(front + self.ndim + a for a in self.order))
        if groups > 1:
            x = x.reshape(*x.shape[:-1], *outputs)
            x = jnp.moveaxis(x, -2, front + len(self.batch))
            kept, outputs = [*kept[: len(self.batch)], outputs[0], *kept[len(self.batch) :]], outputs[1:]
        return x.reshape(*x.shape[:front], *kept, math.prod(inputs), math.prod(outputs))

    def restore(self, x: Any, shape: Sequence[int]) -> Any:
        """The inverse of :meth:`arrange`.

        Args:
          x: what methods see, or what broadcasts against it.
          shape: of the leaf, its last ``ndim`` axes.
        """
        if self.plain:
            return x
        if self.groups > 1:
            place = x.ndim - len(self.window) - 3
            x = jnp.moveaxis(x, place, -2)
            x = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
        inputs, outputs = (
            (1,) * len(axes) if n == 1 else tuple(shape[a] for a in axes)
            for axes, n in ((self.inputs, x.shape[-2]), (self.outputs, x.shape[-1]))
        )
        x = x.reshape(*x.shape[:-2], *inputs, *outputs)
        front = x.ndim - self.ndim
        places = np.argsort(self.order)
        return x.transpose(*range(front), *(front + int(i) for i in places))


@dataclasses.dataclass(frozen=True)
class Relaying:
    """A change of layout of what broadcasts against a leaf: to what methods see, or back.

    Attributes:
      layout: of the leaf.
      sizes: the lengths of its axes that the layout names.
      back: whether from what methods see to the leaf.
    """

    layout: Layout
    sizes: Axes
    back: bool

    def array(self, x: Any, group_size: int | tuple[int, int] | None = None) -> Any:
        """An array that broadcasts against the leaf, laid out anew; None where it then would not.

        Args:
          x: the array.
          group_size: where the inputs count groups: how many are in each; where inputs and outputs count blocks: both.
        """
        layout, sizes = self.layout, list(self.sizes)
        if isinstance(group_size, tuple) and layout.groups > 1:
            return None
        both = group_size if isinstance(group_size, tuple) else (group_size,)
        for size, axes in zip(both, (layout.inputs, layout.outputs), strict=False):
            if size is not None:
                if len(axes) > 1 and sizes[axes[-1]] % size:
                    return None
                sizes[axes[-1]] = -(-sizes[axes[-1]] // size)
        if not self.back:
            return layout.arrange(x)
        seen = layout.seen(sizes)
        ends = list(zip(x.shape[-len(seen) :], seen, strict=True))
        merged = [n == m for n, m in ends[-1:] if m != 1]
        merged += [n == m for n, m in ends[: len(ends) - len(layout.window) - 2][-1:] if layout.groups > 1 and m != 1]
        is_kept = all(n in (1, m) for n, m in ends) and len(set(merged)) < 2
        return layout.restore(x, sizes) if is_kept else None

    def axes(self, axes: Axes) -> Axes:
        """Negative axes, laid out anew; an axis that became several is all of them."""
        layout = self.layout
        window = [(a,) for a in layout.window]
        groups = [()] if layout.groups > 1 else []
        places = [*((a,) for a in layout.batch), *groups, *window, layout.inputs, layout.outputs]
        both = {i - len(places): place for i, place in enumerate(places)}
        beyond, found = len(places) if self.back else layout.ndim, list[int]()
        for axis in axes:
            if axis < -beyond:
                found.append(axis + len(places) - layout.ndim if self.back else axis + layout.ndim - len(places))
            elif self.back:
                found += both[axis]
        if not self.back:
            found += [i for i, place in both.items() if place and all(a in axes for a in place)]
        return tuple(sorted(found))

    def groups(self, group_size: int | tuple[int, int]) -> int | tuple[int, int]:
        """The axis along which groups of inputs that follow one another lie, negative; of blocks both axes."""
        rows, columns = (self.layout.inputs[-1], self.layout.outputs[-1]) if self.back else (-2, -1)
        return (rows, columns) if isinstance(group_size, tuple) else rows


def _tuple(axes: Any) -> Axes:
    return (int(axes),) if isinstance(axes, (int, np.integer)) else tuple(map(int, axes))
