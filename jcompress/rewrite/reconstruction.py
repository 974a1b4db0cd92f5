"""New weights for the next layer, so that its outputs change least when units are cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import PyTree
from jcompress.layers import consumers, units
from jcompress.layers.groups import Group
from jcompress.layers.matrices import Contraction
from jcompress.numeric.damping import cholesky


def reconstruct(
    params: PyTree,
    groups: Mapping[str, Group],
    keep: Mapping[str, jax.Array],
    stats: Mapping[str, Any],
    ridge: float | jax.Array = 0.0,
    biases: bool = False,
) -> PyTree:
    """Refit by least squares the kernels that read the cut units, on the units that stay.

    With X the inputs of a kernel W, and K those that stay, ``min_V ||X W - X_K V||**2``. Only the Gram matrix is
    needed: ``V = W_K + (X_K' X_K)^-1 X_K' X_cut W_cut``, in words, what stays takes over what of the cut part it
    predicts. The Gram matrix is scaled to a unit diagonal first and may be singular: linearly dependent inputs are cut
    without loss. The ridge is a fraction of that diagonal and pulls towards ``W_K``, so for any ridge the error on the
    calibration data is at most that of plain pruning. All this holds where what stays does not depend on what is cut: a
    norm across the units in between (layer or group norm) changes both, and the error may grow.

    This is the second step of channel pruning (He et al. 2017, arXiv:1707.06168) and of ThiNet (Luo et al. 2017,
    arXiv:1707.06342), from the statistics of the dense network: layers are treated one by one, and what the cuts
    before a layer do to its inputs is not seen unless ``stats`` are gathered anew. Works under ``jit``.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      keep: ``{name: bool (size,)}``.
      stats: ``{path: statistics}``; of these ``gram`` and ``axes`` are read, and with biases ``sum`` and ``count``.
      ridge: a fraction of the mean square of each input.
      biases: whether biases are refitted too, where a kernel has one: the mean output stays what it was, and a unit
        that is constant is cut without loss. Found as :func:`correct_biases` finds them.

    Returns:
      The parameters with new kernels, zero where units are cut, and new biases: of the old shapes, for
      ``jc.trace.mask`` or ``jc.shrink``.

    Raises:
      ValueError: for an unknown group, a kernel without statistics, or statistics or a bias that do not fit.

    Example:
      >>> import types, jax.numpy as jnp, jcompress as jc
      >>> from jcompress import rewrite
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]])
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[3.0], [4.0]])}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),), consumers=(("b", 0),))
      >>> stats = {"b": types.SimpleNamespace(gram=x.T @ x, axes=(0,))}
      >>> keep = {"hidden": jnp.array([True, False])}
      >>> rewrite.reconstruct(params, {"hidden": hidden}, keep, stats)["b"].round(4).tolist()
      [[7.0], [0.0]]
    """
    found, changes = units.leaves(params), {}
    for path, (layer, mask) in _cut(groups, keep, found, stats).items():
        stat, shift = layer.stat, consumers.shift_of(path, found, groups) if biases else None
        gram = jnp.reshape(stat.gram, (-1, len(mask), len(mask)))
        w = layer.matrix()
        if shift is None:
            changes[path] = layer.restore(jax.vmap(_refitted, (0, 0, None, None))(gram, w, mask, ridge))
            continue
        mean, covariance = _moments(path, stat, gram)
        new = jax.vmap(_refitted, (0, 0, None, None))(covariance, w, mask, ridge)
        bias, sign = shift
        old = units.leaf(found, bias, path)
        if jnp.size(old) != new.shape[0] * new.shape[2]:
            raise ValueError(f"{bias}: found shape {jnp.shape(old)}, expected {layer.outputs}, the outputs of {path}")
        moved = jnp.einsum("lk,lkn->ln", mean, w - new, precision="highest")
        changes[path] = layer.restore(new)
        changes[bias] = (changes.get(bias, old) + sign * moved.reshape(old.shape)).astype(old.dtype)
    return units.replace(params, changes)


def liar(
    params: PyTree,
    groups: Mapping[str, Group],
    keep: Mapping[str, jax.Array],
    stats: Mapping[str, Any],
    ridge: float | jax.Array = 1e-4,
) -> PyTree:
    """Make good for cut units without retraining (LIAR; Wang et al. 2024, arXiv:2407.13331).

    Whatever criterion chose them, the cut inputs are predicted from those that stay, ``Q = argmin ||X_K Q - X||**2``
    with a ridge, the next kernel becomes ``Q W``, and biases are corrected so that mean outputs stay. Kept inputs
    predict themselves, so the ridge holds the other columns of Q only; the error on the calibration data is then never
    above that of plain pruning, if no norm across the units stands between. This is :func:`reconstruct` with
    biases.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      keep: ``{name: bool (size,)}``.
      stats: ``{path: statistics}``; of these ``gram``, ``axes``, ``sum`` and ``count`` are read.
      ridge: a fraction of the variance of each input.

    Returns:
      The parameters with new kernels and biases, of the old shapes, for ``jc.trace.mask`` or ``jc.shrink``.

    Raises:
      ValueError: as :func:`reconstruct`.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> params = {"a": jnp.array([[1.0, 1.0]]), "b": jnp.array([[3.0], [4.0]])}
      >>> x = jnp.array([[1.0], [2.0], [-1.0]])
      >>> groups, stats = jc.trace.coupling(fn, params, x), jc.calibrate(fn, params, [x], progress=False)
      >>> keep = {"a[1]": jnp.array([True, False])}
      >>> jc.rewrite.liar(params, groups, keep, stats, ridge=0.0)["b"].round(4).tolist()
      [[7.0], [0.0]]
    """
    return reconstruct(params, groups, keep, stats, ridge, biases=True)


def fold_constants(
    params: PyTree,
    groups: Mapping[str, Group],
    keep: Mapping[str, jax.Array],
    constants: Mapping[str, jax.Array],
) -> PyTree:
    """Move the constant outputs of cut units into the next biases, ``b <- b + sum_c W[c] value_c``.

    A channel whose batch norm has scale 0 puts out ``activation(beta)`` everywhere, so cutting it after this is exact.
    It is exact, too, for convolutions without padding; with zero padding the constant is missing at the borders, and
    there outputs differ. Biases are found as :func:`correct_biases` finds them; where batch norm follows in place of
    one, its running mean takes the constants.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      keep: ``{name: bool (size,)}``; only the values of cut units are moved.
      constants: ``{name: (size,)}``: what each unit puts out after its activation, such as ``jax.nn.relu(beta)``.

    Returns:
      The parameters with new biases; ``jc.trace.mask`` or ``jc.shrink`` then cut the units.

    Raises:
      ValueError: for an unknown group, or a kernel without a bias that fits.

    Paper: Liu et al. 2017, arXiv:1708.06519, for channels that batch norm's scale has switched off.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress import rewrite
      >>> params = {"next": {"kernel": jnp.array([[1.0], [5.0]]), "bias": jnp.zeros(1)}}
      >>> hidden = jc.trace.Group(size=2, consumers=(("next/kernel", 0),))
      >>> keep, value = {"hidden": jnp.array([True, False])}, {"hidden": jnp.array([9.0, 2.0])}
      >>> rewrite.fold_constants(params, {"hidden": hidden}, keep, value)["next"]["bias"].tolist()
      [10.0]
    """
    found = units.leaves(params)
    for name, values in constants.items():
        group = units.find(groups, name)
        for path, axis in group.consumers:
            shift = consumers.shift_of(path, found, groups)
            if shift is None:
                raise ValueError(
                    f"{path}: it reads {name!r} and has no bias to take the constants; add a group that says which "
                    "vector does, as jc.trace.Groups.between(params, {(kernel, vector): []}) gives"
                )
            target, sign = shift
            w, old = units.leaf(found, path, name), units.leaf(found, target, name)
            index = group.maps[path, axis]
            value = units.spread(jnp.where(keep[name], 0, values), axis, index, w.ndim, 0)
            moved = _summed_to(jnp.sum(w * value, axis=axis), path, target, old.shape)
            found[target] = (old + sign * moved).astype(old.dtype)
    return units.replace(params, found)


def _summed_to(x: jax.Array, path: str, target: str, shape: tuple[int, ...]) -> jax.Array:
    """The sum over the first axes that a bias does not have."""
    extra = x.ndim - len(shape)
    if extra < 0 or x.shape[extra:] != shape:
        raise ValueError(
            f"{target}: found shape {shape}, expected the last axes of {x.shape}, to take constants of {path}"
        )
    return jnp.sum(x, axis=tuple(range(extra)))


def _cut(
    groups: Mapping[str, Group], keep: Mapping[str, jax.Array], found: Mapping[str, Any], stats: Mapping[str, Any]
) -> dict[str, tuple[Contraction, jax.Array]]:
    """The kernels that read cut units, each with the mask of its k inputs; two groups may share one kernel."""
    layers: dict[str, tuple[Contraction, jax.Array]] = {}
    for name, kept in keep.items():
        for layer, axis in consumers.consumers(name, units.find(groups, name), found, stats, "gram"):
            if getattr(stats[layer.path], "others", ()):
                raise ValueError(
                    f"{layer.path}: found a kernel that is used in several ways (tied), and new weights for one would "
                    f"change the others; leave {name!r} out of keep"
                )
            unit = layer.unit(axis, groups[name].maps[layer.path, axis])
            mask = jnp.where(unit < 0, True, jnp.asarray(kept)[np.maximum(unit, 0)])
            _, other = layers.get(layer.path, (layer, True))
            layers[layer.path] = layer, mask & other
    return layers


def _moments(path: str, stat: Any, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and sum of squares about it: (layers, k), (layers, k, k)."""
    if getattr(stat, "sum", None) is None or getattr(stat, "count", None) is None:
        raise ValueError(
            f"{path}: the bias is refitted from 'sum' and 'count', which the statistics lack; calibrate anew"
        )
    total = jnp.reshape(stat.sum, gram.shape[:-1])
    mean = total / jnp.maximum(jnp.reshape(stat.count, -1), 1).astype(jnp.float32)[:, None]
    return mean, gram - mean[:, :, None] * total[:, None, :]


def _refitted(gram: jax.Array, w: jax.Array, mask: jax.Array, ridge: Any) -> jax.Array:
    """The matrix that is zero outside the mask and, on inputs with this Gram matrix, nearest to ``w``."""
    diagonal = jnp.maximum(jnp.diag(gram), 0)
    scale = jnp.where(mask & (diagonal > 0), jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    missing = jnp.matmul(gram, jnp.where(mask[:, None], 0, w), precision="highest") * scale[:, None]
    taken = _solved(gram * scale[:, None] * scale, missing, ridge) * scale[:, None]
    return jnp.where(mask[:, None], w + taken, 0)


def _solved(a: jax.Array, b: jax.Array, ridge: Any) -> jax.Array:
    """``(a + ridge I)^-1 b`` for a positive semidefinite ``a`` of unit or zero diagonal.

    The factor is damped a little, where it is singular in steps until it exists; two rounds of refinement take the
    damping out of all but the directions in which ``a`` is zero.
    """
    least = 4 * float(jnp.finfo(jnp.float32).eps) * len(a) ** 0.5
    factor = (cholesky(a + (ridge + least) * jnp.eye(len(a), dtype=a.dtype))[0], True)
    x = jax.scipy.linalg.cho_solve(factor, b)
    for _ in range(2):
        residual = b - ridge * x - jnp.matmul(a, x, precision="highest")
        x = x + jax.scipy.linalg.cho_solve(factor, residual)
    return x
