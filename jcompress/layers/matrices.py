"""A leaf as a matrix over what it contracts, beside the statistics of what it meets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context
from jcompress.formats import Masked


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A kernel and the axes of it that the next layer sums over.

    Attributes:
      path: of the kernel.
      w: the kernel.
      axes: those contracted, rising.
      lead: how many first axes are stacked layers, each with statistics of its own.
      split: into how many groups a convolution splits the outputs, each with statistics of its own.
      stat: the statistics.
    """

    path: str
    w: jax.Array
    axes: tuple[int, ...]
    lead: int
    split: int
    stat: Any

    @property
    def _order(self) -> tuple[int, ...]:
        rest = (i for i in range(self.lead, self.w.ndim) if i not in self.axes)
        return (*range(self.lead), *self.axes, *rest)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the contracted axes."""
        return tuple(self.w.shape[i] for i in self.axes)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The shape of a bias: the kernel's without the contracted axes."""
        return tuple(n for i, n in enumerate(self.w.shape) if i not in self.axes)

    def of(self, w: jax.Array) -> Contraction:
        """The same for another array of this layout: a mask, or scales with fewer entries along some axes."""
        return dataclasses.replace(self, w=w)

    def matrix(self) -> jax.Array:
        """The kernel as float32 (stacked layers or groups, k, n)."""
        stack, k = math.prod(self.w.shape[: self.lead]), math.prod(self.shape)
        n = math.prod(self.outputs[self.lead :]) // self.split
        flat = self.w.transpose(self._order).reshape(stack, k, self.split, n)
        return flat.swapaxes(1, 2).reshape(stack * self.split, k, n).astype(jnp.float32)

    def restore(self, matrix: jax.Array) -> jax.Array:
        """The kernel from its matrix."""
        flat = matrix.reshape(len(matrix) // self.split, self.split, *matrix.shape[1:]).swapaxes(1, 2)
        arranged = flat.reshape([self.w.shape[i] for i in self._order])
        return arranged.transpose(np.argsort(self._order)).astype(self.w.dtype)

    def unit(self, axis: int, index: np.ndarray) -> np.ndarray:
        """The unit of each of the k contracted entries, or -1."""
        place = self.axes.index(axis % self.w.ndim)
        along = np.expand_dims(index, [i for i in range(len(self.axes)) if i != place])
        return np.broadcast_to(along, self.shape).ravel()


def contraction(path: str, w: jax.Array, stat: Any, field: str) -> Contraction:
    """The layout of a kernel, from statistics that have ``field``: (..., k) or, for the Gram matrix, (..., k, k).

    Raises:
      ValueError: if the statistic is missing or of another shape than the kernel needs; the message names the path.
    """
    value = getattr(stat, field, None)
    if value is None:
        raise ValueError(
            f"{path}: needs {field!r} of what this kernel meets, and the statistics have none; pass "
            "stats=jc.calibrate(fn, params, batches)"
        )
    if not w.ndim:
        raise ValueError(f"{path}: found a single number, which meets no inputs; keep it dense")
    axes = tuple(sorted(i % w.ndim for i in stat.axes))
    head, k = jnp.shape(value)[: jnp.ndim(value) - (2 if field == "gram" else 1)], math.prod(w.shape[i] for i in axes)
    is_stack = head == w.shape[: len(head)] and all(i >= len(head) for i in axes)
    is_split = len(head) == 1 and len(axes) == w.ndim - 1 and axes[-1] < w.ndim - 1 and w.shape[-1] % head[0] == 0
    if jnp.shape(value)[-1] != k or not (is_stack or is_split):
        raise ValueError(
            f"{path}: found {field!r} of shape {jnp.shape(value)} for a kernel of shape {w.shape} contracted over axes "
            f"{axes}, expected {k} features, after leading axes for stacked layers or the groups of a convolution"
        )
    lead, split = (len(head), 1) if is_stack else (0, head[0])
    return Contraction(path, w, axes, lead, split, stat)


def of(w: jax.Array, context: Context, field: str) -> tuple[Contraction, jax.Array]:
    """The layout of a leaf as float32 (layers, k, outputs), and one statistic for its layers: (layers, k, ...).

    Raises:
      ValueError: if the statistic is missing or of another shape than the leaf needs; the message names the path.
    """
    path, stat = context.path, context.stats
    if stat is not None and not stat.axes:
        raise ValueError(f"{path}: the statistics name no contracted axes, so their layout is unknown; calibrate anew")
    layer = contraction(path, w, stat, field)
    value = jnp.asarray(getattr(stat, field), jnp.float32)
    kept = 2 if field == "gram" else 1
    return layer, value.reshape(-1, *value.shape[value.ndim - kept :])


def spread(layer: Contraction, features: jax.Array) -> jax.Array:
    """One number for each input feature, (layers, k), in a shape that broadcasts to the leaf's."""
    w = layer.w
    if layer.split > 1:
        wide = jnp.repeat(features.T, w.shape[-1] // layer.split, axis=-1)
        return wide.reshape(w.shape)
    sizes = [n if i < layer.lead or i in layer.axes else 1 for i, n in enumerate(w.shape)]
    assert math.prod(sizes) == features.size
    return features.reshape(sizes)


def over_outputs(layer: Contraction, features: jax.Array, path: str, w: jax.Array) -> jax.Array:
    """One number for each input feature of a layer, (layers, k), in a shape that broadcasts to what makes these inputs.

    Args:
      layer: the layer that reads them.
      features: the numbers.
      path: of what makes them.
      w: a kernel, a bias, or the scale of a norm: its last axes are the features, its first ones stacked layers.

    Raises:
      ValueError: if the axes do not fit; the message names both paths.
    """
    stack, made = layer.w.shape[: layer.lead], w.ndim
    size = features.size // max(math.prod(stack), 1)
    while made > layer.lead and math.prod(w.shape[made:]) < size:
        made -= 1
    if w.shape[: layer.lead] != stack or math.prod(w.shape[made:]) != size:
        raise ValueError(
            f"{path}: found shape {w.shape}, expected {(*stack, '...', size)}: its last axes make the {size} inputs of "
            f"{layer.path}; name the leaves that make them, and no others"
        )
    return features.reshape(*stack, *[1] * (made - layer.lead), *w.shape[made:])


def visible(layer: Contraction, context: Context) -> jax.Array:
    """Which entries a mask around the leaf shows, laid out as the matrix."""
    if context.where is None:
        return jnp.ones(jax.eval_shape(layer.matrix).shape, jnp.bool_)
    return layer.of(jnp.broadcast_to(context.where, layer.w.shape).astype(jnp.float32)).matrix() > 0


def masked(layer: Contraction, values: jax.Array, mask: jax.Array) -> Masked:
    """A node from matrices of values and of the mask."""
    kept = layer.of(jnp.zeros(layer.w.shape, jnp.bool_)).restore(mask)
    return Masked(jnp.where(kept, layer.restore(values), jnp.zeros_like(layer.w)), kept)


def with_gram(context: Context, gram: jax.Array) -> Context:
    """The context of transformed inputs: their Gram matrix (layers, k, k) alone is known."""
    stats = context.stats
    known: dict[str, Any] = {f.name: None for f in dataclasses.fields(stats) if not f.metadata.get("static")}
    known |= {"gram": gram.reshape(jnp.shape(stats.gram)), "count": stats.count, "others": ()}
    return dataclasses.replace(context, stats=dataclasses.replace(stats, **known))


def moved(change: jax.Array, gram: jax.Array) -> jax.Array:
    """How far each output moves, in squares: the diagonal of ``change^T gram change``, (layers, outputs)."""
    return jnp.sum(change * jnp.matmul(gram, change, precision=jax.lax.Precision.HIGHEST), axis=-2)
