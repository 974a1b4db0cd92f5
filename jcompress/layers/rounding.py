"""A grid as a sweep over inputs uses it: scales of a group when the sweep reaches it, codes one input at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.formats.quantized import spread
from jcompress.layers.matrices import Contraction
from jcompress.numeric.sweep import Decision, Known


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What a sweep must know of a grid, hashable.

    Attributes:
      method: the method that gives the grid.
      bits: of a code.
      table: the levels, or None.
      codes: dtype of the codes.
      affine: whether there are zero points.
      group_size: how many inputs share a scale that the sweep decides; None if the scales are there before it.
    """

    method: Method
    bits: int
    table: tuple[float, ...] | None
    codes: np.dtype
    affine: bool
    group_size: int | None

    def value(self, row: jax.Array, known: Known) -> jax.Array:
        """The (outputs,) weights of one input, rounded."""
        codes, zero = jnp.zeros(row.shape, self.codes), known["zero"] if self.affine else None
        return Quantized(codes, known["scale"], zero, bits=self.bits, table=self.table).encode(row).materialize()

    def decisions(self) -> list[Decision]:
        """The scales of a group, from its weights as they are by then."""
        if self.group_size is None:
            return []

        def decide(start: jax.Array, w: jax.Array, known: Known, diagonal: jax.Array) -> Known:
            node = self.method(w, Context(where=known["shown"]))
            found = {"scale": node.scale, "zero": node.zero} if self.affine else {"scale": node.scale}
            return {name: jnp.broadcast_to(x.astype(known[name].dtype), w.shape) for name, x in found.items()}

        return [Decision(self.group_size, ("scale", "zero") if self.affine else ("scale",), decide)]


def rounding(method: Method, layer: Contraction, context: Context, early: bool) -> tuple[Rounding, Quantized, Known]:
    """What a sweep needs of ``method``: the rounding, the node to fill, and scales before the sweep.

    Args:
      method: gives a :class:`Quantized` node.
      layer: the layout of the leaf.
      context: of the leaf.
      early: whether scales of groups are taken from the weights before the sweep too.

    Raises:
      ValueError: if the method gives another node, or its groups do not lie along what the layer contracts.
    """
    path, w = context.path, layer.w
    core.check(method, path, w.shape, w.dtype)
    known = dataclasses.replace(context, grad=None, previous=None)

    def fit(w: jax.Array) -> Any:
        return core.fit(method, [w], [known])[0]

    node: Any = jax.eval_shape(fit, w)
    if not isinstance(node, Quantized) or core.is_node(node.scale) or core.is_node(node.zero):
        raise ValueError(
            f"{path}: the grid {method!r} gives {node!r}, expected Quantized with an array of scales and whole zero "
            "points"
        )
    group = node.group_size
    if isinstance(group, int):
        check_groups(path, layer, group)
    early = early or not isinstance(group, int)
    if early:
        node = fit(w)
    affine = node.zero is not None
    found = Rounding(
        method,
        node.bits,
        node.table,
        np.dtype(node.codes.dtype),
        affine,
        group if isinstance(group, int) and not early else None,
    )
    return found, node, _scales(layer, node, early)


def check_groups(path: str, layer: Contraction, group: int) -> None:
    """Raise unless groups of this size hold inputs that follow one another in the matrix of the layer."""
    shape, axes = layer.w.shape, [i - layer.w.ndim for i in layer.axes]
    if axes[-1] != -2 or (len(axes) > 1 and shape[-2] % group):
        raise ValueError(
            f"{path}: groups of {group} along axis -2 of shape {shape} do not divide the contracted axes {axes}; give "
            "the plan a layout, jc.plan(..., layout=), or leave group_size out for one scale an output"
        )


def _scales(layer: Contraction, node: Quantized, early: bool) -> Known:
    """Scales and zero points, one for each weight, as (layers, k, outputs)."""
    matrix = jax.eval_shape(layer.matrix)
    found: Known = {}
    for name, dtype in (("scale", jnp.float32), ("zero", node.codes.dtype)):
        x = getattr(node, name)
        if x is not None and early:
            wide = jnp.broadcast_to(spread(x.astype(jnp.float32), layer.w, node.group_size), layer.w.shape)
            found[name] = layer.of(wide).matrix().astype(dtype)
        elif x is not None:
            found[name] = jnp.ones(matrix.shape, dtype)
    return found


def scaled(known: Known, change: Callable[[jax.Array], jax.Array]) -> Known:
    """What is known, with the scales in other units."""
    return {name: change(x) if name == "scale" else x for name, x in known.items()}


def filled(node: Quantized, layer: Contraction, values: jax.Array, known: Known, rounding: Rounding) -> Quantized:
    """The node with the codes of ``values``, (layers, k, outputs), and the scales that the sweep decided."""

    def laid_out(like: Any, x: jax.Array) -> jax.Array:
        return layer.of(jnp.zeros(like.shape, like.dtype)).restore(x[:, :: rounding.group_size])

    if rounding.group_size is not None:
        zero = laid_out(node.zero, known["zero"]) if rounding.affine else None
        codes = jnp.zeros(layer.w.shape, rounding.codes)
        node = dataclasses.replace(node, codes=codes, scale=laid_out(node.scale, known["scale"]), zero=zero)
    return node.encode(layer.of(jnp.zeros(layer.w.shape)).restore(values))
