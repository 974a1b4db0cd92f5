"""Kernels as matrices over what they contract, beside the statistics of what they meet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jcompress.layers import matrices, units
from jcompress.layers.groups import Group
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


def shift_of(path: str, found: Mapping[str, Any], groups: Mapping[str, Group]) -> tuple[str, int] | None:
    """What a constant added to the outputs of a kernel is put into, and its sign; None if there is nothing.

    The leaf beside it named ``bias`` or ``b``, if its shape fits. Else, in a group that this kernel alone writes, the
    running mean of a norm, which is subtracted, or a vector named as a bias.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.layers import consumers
      >>> params = {"conv/kernel": jnp.ones((3, 3, 2, 4)), "norm/scale": jnp.ones(4), "norm/mean": jnp.zeros(4)}
      >>> groups = jc.trace.Groups.between(params, {("conv/kernel", "norm/scale", "norm/mean"): []})
      >>> consumers.shift_of("conv/kernel", params, groups)
      ('norm/mean', -1)
    """
    for name in ("bias", "b"):
        other = "/".join([*path.split("/")[:-1], name])
        if other in found and other != path and _fits(jnp.shape(found[path]), jnp.shape(found[other])):
            return other, 1
    for group in groups.values():
        kernels, vectors = writers(group, found)
        if kernels != [path]:
            continue
        means = [v for v in vectors if is_named(v, "mean")]
        biases = [v for v in vectors if is_named(v, "bias|beta|offset|shift")]
        if len(means) == 1:
            return means[0], -1
        if len(biases) == 1 and not means:
            return biases[0], 1
    return None


def writers(group: Group, found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The kernels that write a group, and its vectors: biases, and what norms have; stacked layers may lie in front."""
    shapes = {path: jnp.shape(found[path]) for path, _ in group.members if path in found}
    sizes = [len(shape) for shape in shapes.values()] or [0]
    # All share their first axes, and some have more than one axis behind: layers are stacked along them.
    lead = min(sizes) - 1
    stacked = max(sizes) > lead + 1 and len({shape[:lead] for shape in shapes.values()}) == 1
    most = lead + 1 if stacked else 1
    paths = dict.fromkeys(path for path, _ in group.producers if path in shapes)
    return [p for p in paths if len(shapes[p]) > most], [p for p in paths if len(shapes[p]) <= most]


def is_named(path: str, names: str) -> bool:
    """Whether the last word of a path ends in one of these names."""
    return re.fullmatch(f".*({names})", re.split(r"[/.]", path)[-1], re.IGNORECASE) is not None


def _fits(kernel: tuple[int, ...], bias: tuple[int, ...]) -> bool:
    """Whether the shape is that of the outputs: the last axes of the kernel, stacked layers in front, or its first."""
    return 0 < len(bias) < len(kernel) and (kernel[-1] == bias[-1] or kernel[:1] == bias)
