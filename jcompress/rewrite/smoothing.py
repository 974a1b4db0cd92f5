"""Activation ranges moved into weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jcompress import rules
from jcompress.core import Context, PyTree
from jcompress.layers import matrices
from jcompress.layers.groups import Group
from jcompress.rewrite.links import links


def smooth(params: PyTree, groups: Mapping[str, Group], stats: Mapping[str, Any], power: Any = 0.5) -> PyTree:
    """Divide activations by ``s`` where they are made and multiply the kernels that read them by it: the same function.

    ``s_i = max|x_i|**power / max|w_i|**(1 - power)`` over the data and over the kernels, so that channels of
    activations lose their outliers and 8 bits serve both (SmoothQuant; Xiao et al. 2022, arXiv:2211.10438). Channels
    that are always 0, in either, keep their scale.

    Args:
      params: a pytree of arrays.
      groups: of ``jc.trace.coupling``, or by hand: what makes activations (the scale and bias of a norm, the kernel and
        bias of a layer) and all kernels that read them, and nothing else: a kernel left out, or a residual branch,
        would see other activations. Between them each channel must stay a multiple of itself, so pass the groups of
        which that is true. A norm on a residual stream shares its group with the stream: say by hand what reads
        it, ``jc.trace.Groups.between(params, {("norm/scale", "norm/bias"): ["query", "key"]})``.
      stats: from ``jc.calibrate(fn, params, batches, statistics=["absmax"])``.
      power: how much of the range moves, in [0, 1].

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: for a path that is not in ``params``, groups that nothing reads, or statistics that are missing or of
        another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda p, x: (x * p["scale"]) @ p["w"]
      >>> params = {"scale": jnp.ones(2), "w": jnp.array([[1.0], [4.0]])}
      >>> stats = jc.calibrate(fn, params, [jnp.array([[16.0, 1.0]])], statistics=["absmax"])
      >>> moved = jc.rewrite.smooth(params, jc.trace.Groups.between(params, {"scale": ["w"]}), stats)
      >>> moved["scale"].tolist(), moved["w"][:, 0].tolist()
      ([0.25, 2.0], [4.0, 2.0])
    """
    found = rules.leaves(params)
    for _, names, kernels in links(found, groups, "smooth"):
        laid_out = [matrices.of(found[p], Context(stats=stats.get(p), path=p), "absmax") for p in kernels]
        seen = jnp.max(jnp.stack([value for _, value in laid_out]), axis=0)
        largest = jnp.max(jnp.stack([jnp.abs(layer.matrix()).max(-1) for layer, _ in laid_out]), axis=0)
        fits = (seen > 0) & (largest > 0)
        scale = jnp.where(fits, seen**power / jnp.where(fits, largest, 1) ** (1 - power), 1)
        for path in names:
            made = matrices.over_outputs(laid_out[0][0], scale, path, found[path])
            found[path] = (found[path] / made).astype(found[path].dtype)
        for path, (layer, _) in zip(kernels, laid_out, strict=True):
            found[path] = (layer.w * matrices.spread(layer, scale)).astype(layer.w.dtype)
    return rules.rebuild(params, found)
