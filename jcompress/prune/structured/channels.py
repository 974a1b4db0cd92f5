"""Which inputs of a layer to keep so that its outputs change least, from the Gram matrix of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import PyTree
from jcompress.layers import consumers, units
from jcompress.layers.groups import Group
from jcompress.numeric import extremes, scaling
from jcompress.numeric.damping import met


def lasso(
    params: PyTree, groups: Mapping[str, Group], stats: Mapping[str, Any], penalties: int = 100, smallest: float = 1e-4
) -> dict[str, jax.Array]:
    """How early a channel enters the lasso path of the next layer's outputs (He et al. 2017, arXiv:1707.06168).

    ``min_b ||Y - sum_i b_i X_i W_i||**2 / 2 + penalty ||b||_1`` with ``Y = sum_i X_i W_i`` and the part ``W_i`` of the
    kernel that reads channel i scaled to unit norm, by coordinate descent along falling penalties. It needs only
    ``tr(W_i' G_ij W_j)``. The score is the largest penalty, as a fraction of the largest useful one, at which a
    channel is used; the paper takes the channels in use at the penalty that leaves the wanted number, which is the same
    unless a channel leaves the path again. A copy of a channel enters late or never.

    Follow it with :func:`keep` and :func:`reconstruct`. Works under ``jit``. Time grows as ``penalties * size**2``.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      stats: ``{path: statistics}``; of these ``gram`` and ``axes`` are read.
      penalties: how many penalties are tried, in geometric steps. Channels that enter at the same step are ranked by
        their coefficients.
      smallest: the last penalty, as a fraction of the largest useful one; channels unused there score 0.

    Returns:
      ``{name: float32 (size,)}``, in the unit of the largest penalty; larger entered earlier.

    Example:
      >>> import types, jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.ones((1, 3)), "b": jnp.array([[1.0], [1.0], [1.0]])}
      >>> hidden = jc.trace.Group(size=3, producers=(("a", 1),), consumers=(("b", 0),))
      >>> gram = jnp.array([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])  # the second copies the first
      >>> stats = {"b": types.SimpleNamespace(gram=gram, axes=(0,))}
      >>> score = structured.lasso(params, {"hidden": hidden}, stats)["hidden"]
      >>> structured.keep({"hidden": score}, {"hidden": hidden}, sparsity=1 / 3)["hidden"].tolist()
      [True, False, True]
    """
    found = units.leaves(params)
    return {
        name: _lasso_path(_products(name, group, found, stats), _energies(name, group, found), penalties, smallest)
        for name, group in units.prunable(groups).items()
    }


def thinet(params: PyTree, groups: Mapping[str, Group], stats: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Cut channels one by one, each time the one that changes the next layer's outputs least.

    With T the channels cut so far, greedily ``min_i ||sum_{j in T + i} X_j W_j||**2`` (ThiNet; Luo et al. 2017,
    arXiv:1707.06342), over all positions that were calibrated and not a sample of them. The score is the order:
    ``1 / size`` for the first channel to go, 1 for the last. Follow it with :func:`keep` and :func:`reconstruct`,
    which refits the whole kernel where the paper fits one factor for each channel. Works under ``jit``.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      stats: ``{path: statistics}``; of these ``gram`` and ``axes`` are read.

    Returns:
      ``{name: float32 (size,)}``, in (0, 1].

    Example:
      >>> import types, jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.ones((1, 3)), "b": jnp.array([[2.0], [-2.0], [1.0]])}
      >>> hidden = jc.trace.Group(size=3, producers=(("a", 1),), consumers=(("b", 0),))
      >>> gram = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 9.0]])  # the first two cancel
      >>> stats = {"b": types.SimpleNamespace(gram=gram, axes=(0,))}
      >>> score = structured.thinet(params, {"hidden": hidden}, stats)["hidden"]
      >>> structured.keep({"hidden": score}, {"hidden": hidden}, sparsity=2 / 3)["hidden"].tolist()
      [False, False, True]
    """
    found = units.leaves(params)
    return {name: _greedy(_products(name, group, found, stats)) for name, group in units.prunable(groups).items()}


def _products(name: str, group: Group, found: Mapping[str, Any], stats: Mapping[str, Any]) -> jax.Array:
    """The inner products of what each two units add to the next layers' outputs, in units of their own: (size, size).

    Layers and experts that no data reached count as the mean of the others.
    """
    layers = consumers.consumers(name, group, found, stats, "gram")
    weight, energy = scaling.unit([x.w for x, _ in layers]), scaling.unit([x.stat.gram for x, _ in layers])
    total = jnp.zeros((group.size, group.size), jnp.float32)
    for layer, axis in layers:
        unit = layer.unit(axis, group.maps[layer.path, axis])
        target = np.where(unit < 0, group.size, unit)
        w = weight.divide(layer.matrix())
        gram = met(energy.divide(jnp.reshape(layer.stat.gram, (-1, len(unit), len(unit)))))
        pairs = jnp.sum(gram * jnp.einsum("lin,ljn->lij", w, w, precision="highest"), axis=0)
        total = total.at[target[:, None], target].add(pairs, mode="drop")
    return (total + total.T) / 2


def _energies(name: str, group: Group, found: Mapping[str, Any]) -> jax.Array:
    """The norm of the weights that read each unit, in units of their own: (size,)."""
    rows = units.rows(name, group, group.consumers, found)
    return jnp.linalg.norm(scaling.unit([rows]).divide(rows), axis=1)


def _soft(x: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def _descent(
    products: jax.Array, target: jax.Array, penalty: jax.Array, start: jax.Array, active: jax.Array
) -> jax.Array:
    """The lasso's minimum over the active units by cyclic coordinate descent, at most 200 rounds."""
    diagonal = jnp.diag(products)
    usable = active & (diagonal > 0)

    def coordinate(i: jax.Array, b: jax.Array) -> jax.Array:
        rest = target[i] - jnp.dot(products[i], b, precision="highest") + diagonal[i] * b[i]
        value = _soft(rest, penalty) / jnp.where(usable[i], diagonal[i], 1)
        return b.at[i].set(jnp.where(usable[i], value, 0))

    def round_(state: tuple) -> tuple:
        n, b, _ = state
        new = jax.lax.fori_loop(0, len(b), coordinate, b)
        return n + 1, new, jnp.max(jnp.abs(new - b)) > 1e-5 * jnp.max(jnp.abs(new))

    return jax.lax.while_loop(lambda s: s[2] & (s[0] < 200), round_, (0, start, jnp.array(True)))[1]


def _admit(products: jax.Array, target: jax.Array, penalty: jax.Array, slack: jax.Array, start: tuple) -> tuple:
    """Admit one unit at a time, the one that the optimum at this penalty lacks most, until it lacks none.

    One at a time, so that a copy of an admitted unit is not wanted any more when its turn comes.
    """

    def lacking(state: tuple) -> jax.Array:
        b, active = state
        return jnp.where(active, -jnp.inf, jnp.abs(target - jnp.matmul(products, b, precision="highest")) - penalty)

    def admit(state: tuple) -> tuple:
        active = state[1].at[extremes.argmax(lacking(state))].set(True)
        return _descent(products, target, penalty, state[0], active), active

    settled = _descent(products, target, penalty, *start), start[1]
    return jax.lax.while_loop(lambda state: jnp.max(lacking(state)) > slack, admit, settled)


def _lasso_path(products: jax.Array, norms: jax.Array, penalties: int, smallest: float) -> jax.Array:
    """For each unit, the largest penalty at which it is used."""
    scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    products = products * scale[:, None] * scale
    target = jnp.matmul(products, norms, precision="highest")
    step = smallest ** (1 / max(penalties - 1, 1))
    fractions = jnp.asarray(step ** np.arange(penalties), jnp.float32)

    top = jnp.max(jnp.abs(target))

    def visit(state: tuple, fraction: jax.Array) -> tuple:
        b, active, entered = state
        # The slack is what float32 leaves uncertain.
        b, active = _admit(products, target, fraction * top, 1e-3 * fraction * top + 1e-5 * top, (b, active))
        share = jnp.abs(b) / jnp.maximum(jnp.max(jnp.abs(b)), jnp.finfo(jnp.float32).tiny)
        # Within a step the coefficients rank: the next larger penalty is 1 / step away.
        score = fraction * (1 + 0.5 * (1 / step - 1) * share)
        return (b, active, jnp.where(active & (entered == 0), score, entered)), None

    start = (jnp.zeros_like(norms), jnp.zeros(norms.shape, bool), jnp.zeros_like(norms))
    return jax.lax.scan(visit, start, fractions)[0][2]


def _greedy(products: jax.Array) -> jax.Array:
    """The place of each unit in the order in which they are cut, in (0, 1]."""
    size = len(products)

    def cut(step: jax.Array, state: tuple) -> tuple:
        order, along = state  # ``along``: inner products with the sum of what is cut
        change = jnp.where(order > 0, jnp.inf, jnp.diag(products) + 2 * along)
        i = extremes.argmin(change)
        return order.at[i].set((step + 1).astype(order.dtype) / size), along + products[i]

    none = jnp.zeros(size, products.dtype)
    return jax.lax.fori_loop(0, size, cut, (none, none))[0]
