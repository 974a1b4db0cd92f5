"""Convolutions with a contraction of factors: a chain of smaller ones, from the input channels to the output ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jcompress import core
from jcompress.formats.network import mode_sizes
from jcompress.trace.core.contraction import Convolution


@dataclasses.dataclass(frozen=True)
class Link:
    """One factor of a chain.

    Attributes:
      place: of the factor.
      window: which spatial dimensions of the kernel it has, rising.
      order: its axes as (window..., channels it reads, channels it writes), or (window..., channels) by themselves.
      depthwise: whether each channel stays by itself.
    """

    place: int
    window: tuple[int, ...]
    order: tuple[int, ...]
    depthwise: bool


def chain(terms: Sequence[str], window: str, inputs: str, outputs: str) -> list[Link] | None:
    """The factors of a network in the order in which an activation meets them; None where they form no chain.

    Args:
      terms: the modes of each factor.
      window: modes of the spatial dimensions, in their order.
      inputs: the mode of the input channels.
      outputs: that of the output channels.
    """
    left, found, now = dict(enumerate(terms)), [], inputs
    while left:
        # What writes the outputs comes last.
        places = sorted((i for i, t in left.items() if now in t), key=lambda i: outputs in left[i])
        if not places:
            return None
        term = left.pop(places[0])
        written = [m for m in term if m not in window and m != now]
        holders = len(places) > 1
        # Where later factors hold the mode too, it goes on as it is: a product of vectors, term by term.
        depthwise = not written and holders
        if len(written) != (0 if depthwise else 1) or (written and holders):
            return None
        modes = [*(m for m in window if m in term), now, *written]
        dims = tuple(i for i, m in enumerate(window) if m in term)
        found.append(Link(places[0], dims, tuple(term.index(m) for m in modes), depthwise))
        now = written[0] if written else now
    return found if now == outputs else None


def multiply_adds(links: Sequence[Link], factors: Sequence[Any], product: Convolution) -> int:
    """How many products the chain makes, padding included."""
    found, shape = 0, jax.eval_shape(lambda: jnp.zeros(product.eqn.invars[0].aval.shape))  # type: ignore[attr-defined]
    for link in links:
        shape = jax.eval_shape(lambda x, link=link: _step(x, _kernel(factors, link), link, product), shape)
        kernel = factors[link.place]
        channel = product.params["dimension_numbers"].lhs_spec[1]
        found += kernel.size * (shape.size // max(shape.shape[channel], 1))
    return found


def run(links: Sequence[Link], factors: Sequence[jax.Array], product: Convolution, x: jax.Array) -> jax.Array:
    """The activation through the chain."""
    for link in links:
        x = _step(x, _kernel(factors, link).astype(x.dtype), link, product)
    numbers = product.params["dimension_numbers"]
    # Steps keep the layout of the activation; the result may have another one.
    order = [0] * x.ndim
    for mine, theirs in zip(numbers.lhs_spec, numbers.out_spec, strict=True):
        order[theirs] = mine
    return x.transpose(order).astype(product.dtype)


def _kernel(factors: Sequence[Any], link: Link) -> Any:
    return jnp.transpose(factors[link.place], link.order)


def _step(x: jax.Array, kernel: jax.Array, link: Link, product: Convolution) -> jax.Array:
    """One factor: a product over channels, a depthwise or a full convolution along some dimensions."""
    p = product.params
    channel, precision = p["dimension_numbers"].lhs_spec[1], p["precision"]
    if link.depthwise:
        return _shifted(x, kernel, link, product)
    if not link.window:
        y = lax.dot_general(x, kernel, (((channel,), (0,)), ((), ())), precision=precision)
        return jnp.moveaxis(y, -1, channel)
    n = x.ndim - 2
    shape = [kernel.shape[link.window.index(d)] if d in link.window else 1 for d in range(n)]
    spec = p["dimension_numbers"].lhs_spec
    numbers = lax.ConvDimensionNumbers(spec, (n + 1, n, *range(n)), spec)
    chosen: dict[str, Any] = {
        name: tuple(p[key][d] if d in link.window else none for d in range(n))
        for name, key, none in (
            ("window_strides", "window_strides", 1), ("padding", "padding", (0, 0)),
            ("lhs_dilation", "lhs_dilation", 1), ("rhs_dilation", "rhs_dilation", 1),
        )
    }  # fmt: skip
    return lax.conv_general_dilated(
        x, kernel.reshape(*shape, *kernel.shape[-2:]), dimension_numbers=numbers, precision=precision, **chosen
    )


def _shifted(x: jax.Array, kernel: jax.Array, link: Link, product: Convolution) -> jax.Array:
    """A depthwise convolution as one shifted product for each place of the window, added up."""
    p = product.params
    _, channel, *space = p["dimension_numbers"].lhs_spec
    widths = [(0, 0, 0)] * x.ndim
    for d in link.window:
        widths[space[d]] = (*p["padding"][d], p["lhs_dilation"][d] - 1)
    x = lax.pad(x, jnp.zeros((), x.dtype), widths)
    sizes = kernel.shape[:-1]
    total: Any = None
    for offset in itertools.product(*map(range, sizes)):
        starts, limits, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for place, d in enumerate(link.window):
            axis, step, hole = space[d], p["window_strides"][d], p["rhs_dilation"][d]
            count = (x.shape[axis] - (sizes[place] - 1) * hole - 1) // step + 1
            starts[axis] = offset[place] * hole
            limits[axis], strides[axis] = starts[axis] + (count - 1) * step + 1, step
        scale = kernel[offset].reshape([-1 if axis == channel else 1 for axis in range(x.ndim)])
        term = lax.slice(x, starts, limits, strides) * scale
        total = term if total is None else total + term
    return total


def share(node: Any) -> float:
    """The products of a network, as a part of the dense ones, where it is run as ``accelerate`` runs it; at most 1.

    For a convolution of stride 1, and for an activation of many rows.

    Args:
      node: a :class:`~jcompress.formats.TensorNetwork`, or its shapes.
    """
    terms, output = node.equation.split("->")[0].split(","), node.equation.split("->")[1]
    factors = [jax.eval_shape(core.dense, x) for x in node.factors]
    sizes = mode_sizes(node.equation, factors)
    ends = list(itertools.accumulate(node.merged, initial=0))
    *window, inputs, outputs = (output[a:b] for a, b in itertools.pairwise(ends))
    dense = math.prod(sizes[m] for m in output)
    if window:
        single = all(len(modes) == 1 for modes in (*window, inputs, outputs))
        links = chain(terms, "".join(window), inputs, outputs) if single else None
        found = dense if links is None else sum(math.prod(sizes[m] for m in term) for term in terms)
        return min(1.0, found / max(dense, 1))
    rows = 4096
    x: Any = jax.ShapeDtypeStruct((rows, *(sizes[m] for m in inputs)), jnp.float32)
    row = next(m for m in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if m not in node.equation)
    equation = f"{row}{inputs},{','.join(terms)}->{row}{outputs}"
    plain: list[Any] = [
        jax.ShapeDtypeStruct(f.shape[f.ndim - len(t) :], jnp.float32) for f, t in zip(factors, terms, strict=True)
    ]
    least = float(jnp.einsum_path(equation, x, *plain, optimize="optimal")[1].opt_cost)
    return min(1.0, least / (2 * rows * max(dense, 1)))
