"""Kernels as matrices over what they contract, beside the statistics of what they meet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import PyTree
from jcompress.prune.structured import units
from jcompress.prune.structured.units import Group, Groups


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

    def matrix(self) -> jax.Array:
        """The kernel as float32 (stacked layers or groups, k, n)."""
        stack, k = math.prod(self.w.shape[: self.lead]), math.prod(self.shape)
        flat = self.w.transpose(self._order).reshape(stack, k, self.split, -1)
        return flat.swapaxes(1, 2).reshape(stack * self.split, k, -1).astype(jnp.float32)

    def restore(self, matrix: jax.Array) -> jax.Array:
        """The kernel from its matrix."""
        flat = matrix.reshape(-1, self.split, *matrix.shape[1:]).swapaxes(1, 2)
        arranged = flat.reshape([self.w.shape[i] for i in self._order])
        return arranged.transpose(np.argsort(self._order)).astype(self.w.dtype)

    def unit(self, axis: int, index: np.ndarray) -> np.ndarray:
        """The unit of each of the k contracted entries, or -1."""
        place = self.axes.index(axis % self.w.ndim)
        along = np.expand_dims(index, [i for i in range(len(self.axes)) if i != place])
        return np.broadcast_to(along, self.shape).ravel()


def statistics(stats: Mapping[str, Any], path: str, axis: int, ndim: int) -> Any:
    """The statistics of the use in which a kernel contracts an axis; a tied kernel has several."""
    stat = stats.get(path)
    uses = [] if stat is None else [stat, *getattr(stat, "others", ())]
    return next((use for use in uses if axis % ndim in [i % ndim for i in use.axes]), None)


def contraction(
    path: str, axis: int, name: str, found: Mapping[str, Any], stats: Mapping[str, Any], field: str
) -> Contraction:
    """A kernel that reads a group, once its statistics are known to be there and to fit.

    Args:
      path: of the kernel.
      axis: on which it reads the group.
      name: of the group, for error messages.
      found: the parameters by their paths.
      stats: ``{path: statistics}``.
      field: which statistic is wanted: of shape (..., k) or, for the Gram matrix, (..., k, k).
    """
    w = units.leaf(found, path, name)
    stat = statistics(stats, path, axis, w.ndim)
    value = getattr(stat, field, None)
    if stat is None or value is None:
        raise ValueError(
            f"{path}: the group {name!r} needs {field!r} of what this kernel meets, and the statistics have none; pass "
            "stats=jc.calibrate(fn, params, batches)"
        )
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


def consumers(
    name: str, group: Group, found: Mapping[str, Any], stats: Mapping[str, Any], field: str
) -> list[tuple[Contraction, int]]:
    """The kernels that read a group, each with the axis on which they do."""
    if not group.consumers:
        raise ValueError(f"{name}: no kernel reads this group, so nothing tells what its units are worth; leave it out")
    return [(contraction(path, axis, name, found, stats, field), axis) for path, axis in group.consumers]


def beside(params: PyTree, groups: Groups) -> dict[str, str]:
    """The bias of each kernel that reads a group: the leaf beside it named ``bias`` or ``b``, if its shape fits.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> params = {"next": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> structured.beside(params, {"hidden": structured.ManualGroup(size=3, consumers=(("next/kernel", 0),))})
      {'next/kernel': 'next/bias'}
    """
    found, biases = units.leaves(params), {}
    for path in {path for group in groups.values() for path, _ in group.consumers}:
        for name in ("bias", "b"):
            other = "/".join([*path.split("/")[:-1], name])
            if other in found and other != path and _fits(jnp.shape(found[path]), jnp.shape(found[other])):
                biases[path] = other
    return dict(sorted(biases.items()))


def _fits(kernel: tuple[int, ...], bias: tuple[int, ...]) -> bool:
    """Whether the shape is that of the kernel's last axes, but for stacked layers in front."""
    return 0 < len(bias) < len(kernel) and kernel[-1] == bias[-1]
