"""Scales and rotations moved into neighbouring weights, so that nothing of them is stored or run."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import rules
from jcompress.core import Context, PyTree
from jcompress.formats.rotated import hadamard
from jcompress.layers import consumers, matrices, units
from jcompress.layers.groups import Group
from jcompress.quantize.awq import AWQ, best, logarithms, tried
from jcompress.rewrite import links as links_
from jcompress.rewrite.links import links


def fold_scales(
    params: PyTree, groups: Mapping[str, Group], stats: Mapping[str, Any], method: AWQ | None = None
) -> PyTree:
    """Multiply inputs of kernels by the scales of :class:`AWQ` and divide what makes the inputs: the same function.

    Rows ``i`` of the kernels become ``s_i w_i``, with ``s_i = a_i**power`` as there, and one power for all kernels that
    read the same activations: that of the least sum of output errors (Lin et al. 2023, arXiv:2306.00978). Quantized by
    ``method.grid``, the result is as near to the dense model as nodes that keep the scales, without their bits. Then
    calibrate anew: the activations are others.

    Args:
      params: a pytree of arrays.
      groups: of ``jc.trace.coupling``, or by hand, as for :func:`smooth`: what makes activations, and all kernels that
        read them. Between them each channel must stay a multiple of itself: after a norm, from values to attention's
        output, from the side of a gate that is not activated to the layer below, over ReLU.
      stats: from ``jc.calibrate(fn, params, batches, statistics=["gram"])``.
      method: the grid and how many powers are tried; ``AWQ()`` by default.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: for a path that is not there, statistics that are missing, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda p, x: (x * p["scale"]) @ p["w"]
      >>> params = {"scale": jnp.ones(2), "w": jnp.array([[0.4, 0.3], [1.0, -1.0]])}
      >>> stats = jc.calibrate(fn, params, [jnp.array([[10.0, 0.0], [0.0, 1.0]])], statistics=["gram"])
      >>> method = jc.quantize.AWQ(jc.quantize.Int(bits=2))
      >>> folded = jc.rewrite.fold_scales(params, jc.trace.Groups.between(params, {"scale": ["w"]}), stats, method)
      >>> [round(float(x), 2) for x in folded["scale"]]
      [0.55, 1.83]
    """
    method = AWQ() if method is None else method
    found = rules.leaves(params)
    for _, names, kernels in links(found, groups, "fold_scales"):
        contexts = [Context(stats=stats.get(path), path=path) for path in kernels]
        read: list[Any] = [(*matrices.of(found[c.path], c, "gram"), c) for c in contexts]
        logs = logarithms(read[0][1])
        for layer, gram, _ in read:
            if gram.shape != read[0][1].shape:
                raise ValueError(
                    f"{layer.path}: found a Gram matrix of shape {gram.shape}, expected {read[0][1].shape} as that of "
                    f"{kernels[0]}; kernels that are named together read the same activations"
                )
        for path in names:
            matrices.over_outputs(read[0][0], logs, path, found[path])  # raises before anything is computed
        scale = jnp.exp(best(method.points, partial(_error, method, read, logs)) * logs)
        for layer, _, context in read:
            found[context.path] = _times(layer.w, matrices.spread(layer, scale))
        for path in names:
            found[path] = _times(found[path], matrices.over_outputs(read[0][0], 1 / scale, path, found[path]))
    return rules.rebuild(params, found)


def _error(method: AWQ, read: Sequence[Any], logs: jax.Array, power: jax.Array) -> jax.Array:
    """By how much all kernels that read some activations move their outputs."""
    scale = jnp.exp(-power * logs)
    return jnp.stack([tried(method.grid, layer, gram, context, scale)[1] for layer, gram, context in read]).sum()


def fold_norms(params: PyTree, groups: Mapping[str, Group]) -> PyTree:
    """Move the scale and the bias of norms into the kernels that read them: the norm's become 1 and 0.

    ``(g n(x) + b) W + c = n(x) (diag(g) W) + (b W + c)``. A norm without a scale is what :func:`fold_rotations` needs.

    Args:
      params: a pytree of arrays.
      groups: a norm's scale, or scale and bias, and all kernels that read it, each: from ``jc.trace.coupling`` where
        nothing else lies on their axis, or ``jc.trace.Groups.between(params, {("norm/scale", "norm/bias"): ["query",
        ("key", 0)]})``. The bias is the one that is named ``bias``, ``beta``, ``offset`` or ``shift``. Groups by hand
        may also say where a kernel's own bias is, as for :func:`correct_biases`.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: for a path that is not there, a group that kernels or several norms write, a kernel without a bias
        to take a norm's, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"scale": jnp.array([2.0, 3.0]), "kernel": jnp.ones((2, 1))}
      >>> folded = jc.rewrite.fold_norms(params, jc.trace.Groups.between(params, {"scale": ["kernel"]}))
      >>> folded["scale"].tolist(), folded["kernel"].ravel().tolist()
      ([1.0, 1.0], [2.0, 3.0])
    """
    found = rules.leaves(params)
    for name, _, _ in links(found, groups, "fold_norms"):
        group = groups[name]
        scale, shift = _norm_of(name, group, found)
        for path, axis in group.consumers:
            w, index = found[path], group.maps[path, axis]
            if shift is not None:
                moved = jnp.sum(w * _along(path, w, axis, shift, found[shift], index), axis)
                found |= _shifted(path, found, groups, moved)
            found[path] = _times(w, _along(path, w, axis, scale, found[scale], index))
        found[scale] = jnp.ones_like(found[scale])
        if shift is not None:
            found[shift] = jnp.zeros_like(found[shift])
    return rules.rebuild(params, found)


def _norm_of(name: str, group: Group, found: Mapping[str, Any]) -> tuple[str, str | None]:
    """The scale and the bias of a norm, which alone may write the group."""
    kernels, vectors = consumers.writers(group, found)
    shifts = [v for v in vectors if consumers.is_named(v, "bias|beta|offset|shift")]
    scales = [v for v in vectors if v not in shifts]
    if kernels or len(scales) != 1 or len(shifts) > 1:
        told = ", ".join((*kernels, *vectors)[:4])
        raise ValueError(
            f"{name}: found {told} among what writes it, expected the scale of one norm, and its bias at most; say by "
            "hand what reads the norm: jc.trace.Groups.between(params, {(scale, bias): [kernels]})"
        )
    return scales[0], shifts[0] if shifts else None


def _shifted(
    kernel: str, found: Mapping[str, Any], groups: Mapping[str, Group], moved: jax.Array
) -> dict[str, jax.Array]:
    """The bias of a kernel with what its inputs' shift adds to its outputs."""
    target = consumers.shift_of(kernel, found, groups)
    if target is None:
        raise ValueError(
            f"{kernel}: found no bias that takes the norm's; keep the norm's bias, or add a group that says which "
            "vector does, as jc.trace.Groups.between(params, {(kernel, bias): []}) gives"
        )
    path, sign = target
    bias = found[path]
    if bias.shape != moved.shape:
        raise ValueError(f"{path}: found shape {bias.shape}, expected {moved.shape} as outputs of {kernel}")
    return {path: (bias + sign * moved).astype(bias.dtype)}


def fold_rotations(params: PyTree, groups: Mapping[str, Group], key: jax.Array) -> PyTree:
    """Rotate activations by randomized Hadamard matrices, and take that back where they are read: the same function.

    What makes activations becomes ``W R``, what reads them ``R^T W``, with ``R = diag(signs) H / sqrt(n)``: neither
    the activations nor the rows of the kernels keep outliers, and nothing is rotated when the model runs (QuaRot;
    Ashkboos et al. 2024, arXiv:2404.00456). ``jc.quantize.Rotation`` rotates a kernel by itself instead, and stores
    signs.

    Args:
      params: a pytree of arrays.
      groups: of ``jc.trace.coupling``, or by hand: everything that makes some activations, such as all that is added to
        a residual stream, embeddings and biases among them, and all kernels that read these. Where an axis holds a
        group several times, as the channels of heads laid one after another do, all are rotated alike. Only what
        turns with its input may lie between: sums, attention over positions, and the norm by root mean square once
        its scale is folded (:func:`fold_norms`); no elementwise function, and no norm that takes off a mean. Scales
        of folded norms must be left out of the group.
      key: of the signs; every group has its own.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: for a path that is not there, or a group that fills an axis in part.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.array([[8.0, 0.0, 0.0, 0.0]]), "down": jnp.ones((4, 1))}
      >>> groups = jc.trace.coupling(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 1))).prunable
      >>> turned = jc.rewrite.fold_rotations(params, groups, jax.random.key(0))
      >>> float(abs(turned["up"]).max()), float((turned["up"] @ turned["down"])[0, 0])
      (4.0, 8.0)
    """
    found = rules.leaves(params)
    for name in groups:
        group = groups[name]
        links_.check(found, name, tuple(path for path, _ in group.members))
        own = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        signs = jax.random.bernoulli(own, jnp.float32(0.5), (group.size,))
        for path, axis in group.members:
            index = group.maps[path, axis]
            if (index < 0).any() or len(set(np.bincount(index, minlength=group.size))) > 1:
                raise ValueError(
                    f"{path}: the group {name!r} fills axis {axis} of shape {found[path].shape} in part; a "
                    "rotation mixes all of it"
                )
            rows = units.gather(found[path].astype(jnp.float32), axis, index, group.size)
            flat = rows.reshape(group.size, -1)
            turned = hadamard(jnp.where(signs[:, None], -flat, flat), transpose=True).reshape(rows.shape)
            found[path] = units.scatter(found[path], axis, index, turned)
    return rules.rebuild(params, found)


def _times(w: jax.Array, factor: jax.Array) -> jax.Array:
    return (w * factor).astype(w.dtype)


def _along(path: str, w: jax.Array, axis: int, name: str, features: jax.Array, index: np.ndarray) -> jax.Array:
    """What a norm has for each channel, in float32 along an axis of a kernel; first axes of both are stacked layers."""
    lead = features.ndim - 1
    place = axis % w.ndim
    if place < lead or w.shape[:lead] != features.shape[:lead]:
        raise ValueError(
            f"{path}: axis {axis} of shape {w.shape} does not fit {name} of shape {features.shape}; name the axis that "
            "reads the norm, as (path, axis)"
        )
    wide = features.astype(jnp.float32)[..., index]
    return wide.reshape(*wide.shape[:-1], *[1] * (place - lead), -1, *[1] * (w.ndim - 1 - place))
