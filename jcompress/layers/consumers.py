"""Kernels as matrices over what they contract, beside the statistics of what they meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.layers import matrices, units
from jcompress.layers.groups import Group, Groups
from jcompress.layers.matrices import Contraction


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
    return matrices.contraction(path, w, stat, field)


def consumers(
    name: str, group: Group, found: Mapping[str, Any], stats: Mapping[str, Any], field: str
) -> list[tuple[Contraction, int]]:
    """The kernels that read a group, each with the axis on which they do."""
    if not group.consumers:
        raise ValueError(f"{name}: no kernel reads this group, so nothing tells what its units are worth; leave it out")
    return [(contraction(path, axis, name, found, stats, field), axis) for path, axis in group.consumers]


def beside(params: PyTree, groups: Groups) -> dict[str, str]:
    """The bias of each kernel that reads a group: the leaf beside it named ``bias`` or ``b``, if its shape fits.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.

    Returns:
      ``{path of a kernel: path of its bias}``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"next": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> structured.beside(params, {"hidden": jc.trace.Group(size=3, consumers=(("next/kernel", 0),))})
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
