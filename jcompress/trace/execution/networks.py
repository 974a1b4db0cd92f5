"""A contraction of factors inside a function: the activation is contracted into it, along the cheapest path."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Layout
from jcompress.formats import Arranged, TensorNetwork
from jcompress.formats.network import mode_sizes
from jcompress.trace.core import chains, walk
from jcompress.trace.core.contraction import Convolution, Dot, Product
from jcompress.trace.core.flow import Step
from jcompress.trace.core.layouts import Cast, Permutation
from jcompress.trace.core.views import View
from jcompress.trace.execution import rows
from jcompress.trace.execution.weights import Multiply, Tell, Weight, static

_SPARE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PAIR = "ir,ro->io"
"""Of two factors."""
WORTH = 0.7
"""A contraction is made with the factors where that takes this part of the dense products, or less: between many small
products more is moved."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """Factors whose contraction is a weight, laid out as the value is.

    Attributes:
      factors: dense arrays.
      equation: of the network.
      merged: how many of its modes make each axis of (window..., inputs, outputs).
      layout: what the axes of the value are.
      sizes: their lengths.
      path: the parameter.
    """

    factors: tuple[jax.Array, ...]
    equation: str = static()
    merged: tuple[int, ...] = static()
    layout: Layout = static()
    sizes: tuple[int, ...] = static()
    path: str = static("")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.sizes

    def dense(self) -> jax.Array:
        """The array it stands for."""
        node = TensorNetwork(self.factors, self.equation, self.merged)
        return self.layout.restore(node.materialize(), self.sizes)

    def laid_out(self, step: Step) -> list[Network] | None:
        """As for :class:`Weight`; what is not transposed is made dense."""
        if not isinstance(step.flow, (Cast, Permutation)) or not all(isinstance(k, View) for k in step.outs):
            return None
        if isinstance(step.flow, Cast):
            dtype = walk.aval(step.eqn.outvars[0]).dtype
            return [dataclasses.replace(self, factors=tuple(x.astype(dtype) for x in self.factors))]
        n = len(self.sizes)
        found = {axis: step.flow.place(step.eqn, axis + n) for axis in range(-n, 0)}
        moved = {axis: place for axis, place in found.items() if place is not None}
        if len(moved) != n:
            return None
        named: dict[str, Any] = {
            name: tuple(moved[a] - n for a in getattr(self.layout, name)) for name in ("inputs", "outputs", "window")
        }
        sizes = [0] * n
        for axis, place in moved.items():
            sizes[place] = self.sizes[axis]
        return [dataclasses.replace(self, layout=Layout(**named), sizes=tuple(sizes))]

    def stacked(self) -> Network:
        """As for :class:`Weight`: the factors of stacked layers have these in front already."""
        return self

    def product(self, product: Product, x: jax.Array, multiply: Multiply, tell: Tell) -> jax.Array:
        """The product with an activation, by the factors or the dense array, whichever takes less."""
        short: Any = None
        if isinstance(product, Dot):
            short = self._dot(product, x)
        elif isinstance(product, Convolution):
            short = self._convolution(product, x)
        if short is None:
            dense = self.dense()
            return multiply(product, x, Weight(dense, dtype=dense.dtype, path=self.path, note=self._note()))
        y, how = short
        tell(self.sizes, how)
        return y

    def _note(self) -> str:
        return f"{'LowRank' if self.equation == _PAIR else 'TensorNetwork'} is made dense"

    def _groups(self) -> list[str]:
        """The modes of each axis of (window..., inputs, outputs)."""
        output = self.equation.split("->")[1]
        ends = list(itertools.accumulate(self.merged, initial=0))
        return [output[a:b] for a, b in itertools.pairwise(ends)]

    def _dot(self, product: Dot, x: jax.Array) -> tuple[jax.Array, str] | None:
        """A contraction of the activation into the network; None where that takes more than the dense product."""
        mine, batch = product.contracted, product.numbers[1][0]
        n, layout = len(self.sizes), self.layout
        wanted = [a + n for a in layout.inputs]
        if batch or layout.window or sorted(mine) != sorted(wanted):
            return None
        inputs, outputs = self._groups()
        sizes = mode_sizes(self.equation, self.factors)
        flat, restored = rows.flattened(product, x, self.sizes, layout.inputs, layout.outputs)
        lead, count = flat.shape[:-1], math.prod(flat.shape[:-1])
        flat = flat.reshape(count, *(sizes[mode] for mode in inputs))
        row = next(m for m in _SPARE if m not in self.equation)
        equation = f"{row}{inputs},{self.equation.split('->')[0]}->{row}{outputs}"
        factors = [f.astype(x.dtype) for f in self.factors]
        path, told = jnp.einsum_path(equation, flat, *factors, optimize="optimal")
        least, dense = float(told.opt_cost), 2 * count * math.prod(self.sizes)
        if least > WORTH * dense:
            return None
        y = jnp.einsum(equation, flat, *factors, optimize=path, precision=product.eqn.params["precision"])
        return restored(y.reshape(*lead, -1)), f"{len(factors)} factors, {least / dense:.0%} of the dense products"

    def _convolution(self, product: Convolution, x: jax.Array) -> tuple[jax.Array, str] | None:
        """A chain of smaller convolutions; None where there is none, or it takes more."""
        n, numbers = len(self.sizes), product.params["dimension_numbers"]
        out, channel, *space = numbers.rhs_spec
        layout = self.layout
        single = len(layout.inputs) == len(layout.outputs) == 1 and product.params["feature_group_count"] == 1
        if not single or (layout.outputs[0] + n, layout.inputs[0] + n) != (out, channel):
            return None
        *window, inputs, outputs = self._groups()
        if any(len(modes) != 1 for modes in (*window, inputs, outputs)) or product.side == 0:
            return None
        # The window in the order of the convolution's own dimensions.
        places = [layout.window.index(d - n) for d in space]
        named = "".join(window[i] for i in places)
        links = chains.chain(self.equation.split("->")[0].split(","), named, inputs, outputs)
        if links is None:
            return None
        least, dense = chains.multiply_adds(links, self.factors, product), product.multiply_adds()
        if least > WORTH * dense:
            return None
        y = chains.run(links, self.factors, product, x)
        return y, f"a chain of {len(links)}, {least / dense:.0%} of the dense products"


def of_network(path: str, leaf: Any) -> Network | None:
    """The operand of a node that is a network, arranged or not; None for another one."""
    inner, layout = (leaf.inner, leaf.layout) if isinstance(leaf, Arranged) else (leaf, None)
    if not isinstance(inner, TensorNetwork) or (layout is not None and (layout.batch or layout.groups > 1)):
        return None
    factors = tuple(core.dense(x) for x in inner.factors)
    n = len(inner.merged)
    if layout is None:
        layout = Layout(window=range(n - 2), inputs=n - 2, outputs=n - 1)
        sizes = jax.eval_shape(lambda node: node.materialize(), inner).shape[-n:]
    else:
        sizes = leaf.sizes
    if n != len(layout.window) + 2:
        return None
    return Network(factors, equation=inner.equation, merged=inner.merged, layout=layout, sizes=tuple(sizes), path=path)


def of_factors(path: str, leaf: Arranged) -> Network | None:
    """The operand of two factors whose outputs are several axes, as of heads that a kernel splits them into."""
    if leaf.layout.window:
        return None
    factors = core.dense(leaf.inner.u), core.dense(leaf.inner.v)
    return Network(factors, equation=_PAIR, merged=(1, 1), layout=leaf.layout, sizes=leaf.sizes, path=path)
