"""Activation ranges moved into weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import rules
from jcompress.core import Context, PyTree
from jcompress.layers import matrices


def smooth(
    params: PyTree, stats: Mapping[str, Any], pairs: Mapping[str | tuple[str, ...], Sequence[str]], power: Any = 0.5
) -> PyTree:
    """Divide activations by ``s`` where they are made and multiply the kernels that read them by it: the same function.

    ``s_i = max|x_i|**power / max|w_i|**(1 - power)`` over the data and over the kernels, so that channels of
    activations lose their outliers and 8 bits serve both (SmoothQuant; Xiao et al. 2022, arXiv:2211.10438). Channels
    that are always 0, in either, keep their scale.

    Args:
      params: a pytree of arrays.
      stats: from ``jc.calibrate(fn, params, batches, statistics=["absmax"])``.
      pairs: for the leaves that scale the activations, (scale, bias) of a norm, (kernel, bias) of a layer or one path,
        the paths of all kernels that read them, and of nothing else: a kernel left out, or a residual branch, would see
        other activations.
      power: how much of the range moves, in [0, 1].

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: for a path that is not in ``params``, or statistics that are missing or of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda p, x: (x * p["scale"]) @ p["w"]
      >>> params = {"scale": jnp.ones(2), "w": jnp.array([[1.0], [4.0]])}
      >>> stats = jc.calibrate(fn, params, [jnp.array([[16.0, 1.0]])], statistics=["absmax"])
      >>> moved = jc.rewrite.smooth(params, stats, {"scale": ["w"]})
      >>> moved["scale"].tolist(), moved["w"][:, 0].tolist()
      ([0.25, 2.0], [4.0, 2.0])
    """
    leaves, treedef = rules.paths(params), jax.tree.structure(params)
    found = dict(leaves)
    for norm, kernels in pairs.items():
        names = (norm,) if isinstance(norm, str) else norm
        for path in (*names, *kernels):
            if path not in found:
                raise ValueError(f"{path}: not in the parameters, which are {sorted(found)[:5]} and so on")
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
    return jax.tree.unflatten(treedef, [found[path] for path, _ in leaves])
