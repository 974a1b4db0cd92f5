"""Scales and rotations moved into neighbouring weights, so that nothing of them is stored or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core, rules
from jcompress.core import Context, PyTree
from jcompress.formats.rotated import hadamard
from jcompress.layers import matrices
from jcompress.quantize.awq import AWQ, best, logarithms, tried

Makers = str | tuple[str, ...]
"""Paths of the leaves that together make some activations: a kernel and its bias, or the scale and bias of a norm."""
Reader = str | tuple[str, int]
"""Path of a kernel that reads activations along axis -2; or the path and the axis."""


def fold_scales(
    params: PyTree, stats: Mapping[str, Any], pairs: Mapping[Makers, Sequence[str]], method: AWQ | None = None
) -> PyTree:
    """Multiply inputs of kernels by the scales of :class:`AWQ` and divide what makes the inputs: the same function.

    Rows ``i`` of the kernels become ``s_i w_i``, with ``s_i = a_i**power`` as there, and one power for all kernels that
    read the same activations: that of the least sum of output errors (Lin et al. 2023, arXiv:2306.00978). Quantized by
    ``method.grid``, the result is as near to the dense model as nodes that keep the scales, without their bits. Then
    calibrate anew: the activations are others.

    Args:
      params: a pytree of arrays.
      stats: from ``jc.calibrate(fn, params, batches, statistics=["gram"])``.
      pairs: for the leaves that make activations, one path or several, the paths of all kernels that read them, and of
        nothing else. Between them each channel must stay a multiple of itself: after a norm, from values to attention's
        output, from the side of a gate that is not activated to the layer below, over ReLU.
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
      >>> folded = jc.rewrite.fold_scales(params, stats, {"scale": ["w"]}, method)
      >>> [round(float(x), 2) for x in folded["scale"]]
      [0.55, 1.83]
    """
    method = AWQ() if method is None else method
    found = _leaves(params)
    for makers, kernels in pairs.items():
        names = _names(makers)
        _check(found, names, kernels)
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
    return _like(params, found)


def _error(method: AWQ, read: Sequence[Any], logs: jax.Array, power: jax.Array) -> jax.Array:
    """By how much all kernels that read some activations move their outputs."""
    scale = jnp.exp(-power * logs)
    return jnp.stack([tried(method.grid, layer, gram, context, scale)[1] for layer, gram, context in read]).sum()


def fold_norms(
    params: PyTree,
    pairs: Mapping[Makers, Sequence[Reader]],
    biases: Mapping[str, str] | None = None,
) -> PyTree:
    """Move the scale and the bias of norms into the kernels that read them: the norm's become 1 and 0.

    ``(g n(x) + b) W + c = n(x) (diag(g) W) + (b W + c)``. A norm without a scale is what :func:`fold_rotations` needs.

    Args:
      params: a pytree of arrays.
      pairs: for a norm's scale, or (scale, bias), the kernels that read it, and nothing else. The axis that is read is
        -2, or the one named.
      biases: for each kernel's path its bias's, where the norm has a bias; by default ``.../kernel`` has ``.../bias``.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: for a path that is not there, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"scale": jnp.array([2.0, 3.0]), "kernel": jnp.ones((2, 1))}
      >>> folded = jc.rewrite.fold_norms(params, {"scale": ["kernel"]})
      >>> folded["scale"].tolist(), folded["kernel"].ravel().tolist()
      ([1.0, 1.0], [2.0, 3.0])
    """
    found = _leaves(params)
    for makers, readers in pairs.items():
        scale, *shift = _names(makers)
        kernels = [_axis(r) for r in readers]
        _check(found, (scale, *shift), [path for path, _ in kernels])
        for path, axis in kernels:
            w = found[path]
            if shift:
                bias = (biases or {}).get(path, f"{path.removesuffix('kernel')}bias")
                _check(found, (bias,), (path,))
                moved = jnp.sum(w * _along(path, w, axis, shift[0], found[shift[0]]), axis)
                found[bias] = _shifted(bias, found[bias], moved, path)
            found[path] = _times(w, _along(path, w, axis, scale, found[scale]))
        found[scale] = jnp.ones_like(found[scale])
        found |= {path: jnp.zeros_like(found[path]) for path in shift}
    return _like(params, found)


def _shifted(path: str, bias: jax.Array, moved: jax.Array, kernel: str) -> jax.Array:
    if bias.shape != moved.shape:
        raise ValueError(
            f"{path}: found shape {bias.shape}, expected {moved.shape} as outputs of {kernel}; pass biases="
        )
    return (bias + moved).astype(bias.dtype)


def fold_rotations(
    params: PyTree, pairs: Mapping[Makers, Sequence[Reader]], seed: int = 0, block_size: int | None = None
) -> PyTree:
    """Rotate activations by randomized Hadamard matrices, and take that back where they are read: the same function.

    What makes activations becomes ``W R``, what reads them ``R^T W``, with ``R = diag(signs) H / sqrt(n)``: neither
    the activations nor the rows of the kernels keep outliers, and nothing is rotated when the model runs (QuaRot;
    Ashkboos et al. 2024, arXiv:2404.00456). :class:`Rotation` rotates a kernel by itself instead, and stores signs.

    Args:
      params: a pytree of arrays.
      pairs: for all leaves whose last axis makes some activations, such as everything that is added to a residual
        stream, embeddings and biases among them, all kernels that read these, along axis -2 or the one named. Only
        what turns with its input may lie between: sums, attention over positions, and the norm by root mean square once
        its scale is folded (:func:`fold_norms`); no elementwise function, and no norm that takes off a mean. A
        table that makes activations and reads them again, transposed, is named once, as a maker.
      seed: of the signs; every pair has its own.
      block_size: rotate in blocks of this many, all alike: the head dimension, where channels of heads lie one after
        another. None for one block.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: for a path that is not there, sizes that do not fit, or a block size that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.array([[8.0, 0.0, 0.0, 0.0]]), "down": jnp.ones((4, 1))}
      >>> turned = jc.rewrite.fold_rotations(params, {"up": ["down"]})
      >>> float(abs(turned["up"]).max()), float((turned["up"] @ turned["down"])[0, 0])
      (4.0, 8.0)
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"fold_rotations: block_size={block_size} must be positive, or None for one block")
    found = _leaves(params)
    for i, (makers, readers) in enumerate(pairs.items()):
        axes = [(path, -1) for path in _names(makers)] + [_axis(r) for r in readers]
        _check(found, _names(makers), [_axis(r)[0] for r in readers])
        first = axes[0][0]
        size = block_size or found[first].shape[-1]
        signs = jax.random.bernoulli(jax.random.fold_in(jax.random.key(seed), i), shape=(size,))
        for path, axis in axes:
            w = found[path]
            if not -w.ndim <= axis < w.ndim or w.shape[axis] % size or (block_size is None and w.shape[axis] != size):
                expected = f"blocks of {size}" if block_size else f"{size}, as the last axis of {first} is"
                raise ValueError(f"{path}: found shape {w.shape}, expected axis {axis} to be {expected}; name the axis")
            found[path] = _turned(w, axis, signs)
    return _like(params, found)


def _turned(w: jax.Array, axis: int, signs: jax.Array) -> jax.Array:
    """``R^T`` applied along an axis, block by block."""
    wide = jnp.moveaxis(w.astype(jnp.float32), axis, -1)
    blocks = wide.reshape(*wide.shape[:-1], -1, signs.size, 1)
    turned = hadamard(jnp.where(signs[:, None], -blocks, blocks), transpose=True)
    return jnp.moveaxis(turned.reshape(wide.shape), -1, axis).astype(w.dtype)


def _leaves(params: PyTree) -> dict[str, Any]:
    return dict(rules.paths(params))


def _like(params: PyTree, found: Mapping[str, Any]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=core.is_node), list(found.values()))


def _names(makers: Makers) -> tuple[str, ...]:
    return (makers,) if isinstance(makers, str) else makers


def _axis(reader: Reader) -> tuple[str, int]:
    return (reader, -2) if isinstance(reader, str) else reader


def _times(w: jax.Array, factor: jax.Array) -> jax.Array:
    return (w * factor).astype(w.dtype)


def _along(path: str, w: jax.Array, axis: int, name: str, features: jax.Array) -> jax.Array:
    """What a norm has for each channel, in float32 along an axis of a kernel; first axes of both are stacked layers."""
    lead = features.ndim - 1
    place = axis % w.ndim if -w.ndim <= axis < w.ndim else -1
    if place < lead or (*w.shape[:lead], w.shape[place]) != features.shape:
        raise ValueError(
            f"{path}: axis {axis} of shape {w.shape} does not fit {name} of shape {features.shape}; name the axis that "
            "reads the norm, as (path, axis)"
        )
    wide = features.astype(jnp.float32)
    return wide.reshape(*features.shape[:-1], *[1] * (place - lead), -1, *[1] * (w.ndim - 1 - place))


def _check(found: Mapping[str, Any], makers: Sequence[str], readers: Sequence[str]) -> None:
    for path in (*makers, *readers):
        if path not in found:
            raise ValueError(f"{path}: there is no such parameter; the paths are {', '.join(found)}")
        if core.is_node(found[path]):
            kind = type(found[path]).__name__
            raise ValueError(f"{path}: found a {kind} node, expected an array; fold first, then compress")
    if not readers:
        raise ValueError(f"{', '.join(makers)}: found no kernel that reads what they make, expected one at least")
