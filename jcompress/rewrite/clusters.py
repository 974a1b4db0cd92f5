"""P-pruning: of units that put out the same, one is enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import PyTree
from jcompress.layers import consumers, units
from jcompress.layers.groups import Group
from jcompress.numeric import extremes, scaling
from jcompress.prune.masks import selection


def p_pruning(
    params: PyTree,
    groups: Mapping[str, Group],
    stats: Mapping[str, Any],
    sparsity: Any,
    scores: Mapping[str, jax.Array] | None = None,
    absorb: bool = True,
) -> tuple[dict[str, jax.Array], PyTree]:
    """Cluster the outputs of heads or neurons and keep one unit of each cluster (P-pruning; Wang et al. 2024).

    The distance of units i and j is that of what they put out on the calibration data, ``||X_i - X_j||**2 =
    G_ii + G_jj - 2 G_ij``, from the Gram matrix of the kernels that read them; a head is the block of its dimensions.
    There are as many clusters as units that stay. Their centers start as far apart as can be, the first at the unit of
    the highest score (Gonzalez 1985), and move by rounds of k-medoids until none does (Park & Jun 2009). All is
    deterministic; ties go to the lower index.

    Of each cluster the unit of the highest score stays, or without scores its center. With ``absorb`` the weights that
    read the others are added to those that read the one that stays, which is exact for units whose outputs are equal.
    The paper prunes before fine-tuning on the data of the task; how it clusters is not in its abstract, so that choice
    is ours.

    Works under ``jit``, with a traced sparsity.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``; all prunable ones are treated.
      stats: ``{path: statistics}``; of these ``gram`` and ``axes`` are read.
      sparsity: the fraction of units to cut, in [0, 1], of each group, or ``{name: fraction}`` for some groups.
      scores: ``{name: (size,)}``, such as :func:`taylor` gives.
      absorb: whether those that stay take over the weights of the others.

    Returns:
      ``(keep, new_params)``: ``{name: bool (size,)}``, and the parameters, of their old shapes. At least one unit of
      each group stays.

    Raises:
      ValueError: for a sparsity outside [0, 1], a group that is unknown or that no kernel reads, a kernel without
        statistics, or one that is used in several ways and would have to absorb.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.array([[1.0, 5.0, 1.0]]), "b": jnp.array([[1.0], [2.0], [3.0]])}
      >>> def fn(p, x):
      ...     return (x @ p["a"]) @ p["b"]
      >>> x = jnp.array([[1.0], [2.0]])
      >>> groups, stats = jc.trace.coupling(fn, params, x), jc.calibrate(fn, params, [(x,)], progress=False)
      >>> keep, new = jc.rewrite.p_pruning(params, groups, stats, 1 / 3)
      >>> keep["a[1]"].tolist(), new["b"].ravel().tolist()
      ([True, True, False], [4.0, 2.0, 0.0])
    """
    fractions = dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(units.prunable(groups), sparsity)
    found, keep = units.leaves(params), {}
    for name, fraction in fractions.items():
        group = units.find(groups, name)
        if core.is_concrete(fraction):
            selection.check_sparsity(f"{name}: p_pruning", fraction)
        products = _output_products(name, group, found, stats)
        score = None if scores is None else jnp.asarray(scores[name], jnp.float32)
        count = jnp.maximum(jnp.asarray(selection.kept(group.size, fraction), jnp.int32), 1)
        survivor = _survivors(products, count, score)
        keep[name] = survivor == jnp.arange(group.size)
        if absorb:
            _absorb(name, group, survivor, found, stats)
    return keep, units.replace(params, found)


def _output_products(name: str, group: Group, found: Mapping[str, Any], stats: Mapping[str, Any]) -> jax.Array:
    """The inner products of what each two units put out, over all kernels that read them: (size, size)."""
    total = jnp.zeros((group.size, group.size), jnp.float32)
    for layer, axis in consumers.consumers(name, group, found, stats, "gram"):
        table = units.positions(layer.unit(axis, group.maps[layer.path, axis]), group.size)
        gram = jnp.reshape(layer.stat.gram, (-1, *layer.stat.gram.shape[-2:])).sum(axis=0)
        for occurrence in table.T:
            total = total + gram.at[occurrence[:, None], occurrence].get(mode="fill", fill_value=0)
    return total


def _survivors(products: jax.Array, count: jax.Array, score: jax.Array | None) -> jax.Array:
    """For each unit, the one that stays for it: (size,)."""
    products = scaling.unit([products]).divide(products)
    energies = jnp.diag(products)
    apart = jnp.maximum(energies[:, None] + energies - 2 * products, 0)
    rank = energies if score is None else score
    center = _centers(apart, count, extremes.argmax(rank))
    if score is None:
        return center
    return extremes.argmax(jnp.where(center[:, None] == center, rank, -jnp.inf), axis=1)


def _centers(apart: jax.Array, count: jax.Array, first: jax.Array) -> jax.Array:
    """The center of each unit's cluster, by k-medoids from a farthest-point start."""
    index = jnp.arange(len(apart))

    def assign(chosen: jax.Array) -> jax.Array:
        # A center is its own, even where another lies in the same place, so no cluster ever empties.
        return jnp.where(chosen, index, extremes.argmin(jnp.where(chosen, apart, jnp.inf), axis=1))

    def farthest(_: Any, chosen: jax.Array) -> jax.Array:
        nearest = jnp.min(jnp.where(chosen, apart, jnp.inf), axis=1)
        return chosen.at[extremes.argmax(jnp.where(chosen, -1.0, nearest))].set(True)

    def move(state: tuple) -> tuple:
        step, center, _ = state
        same = center[:, None] == center
        cost = jnp.sum(jnp.where(same, apart, 0), axis=1)
        moved = extremes.argmin(jnp.where(same, cost, jnp.inf), axis=1)
        new = assign(jnp.zeros(len(apart), bool).at[moved].set(True))
        return step + 1, new, jnp.any(new != center)

    chosen = jax.lax.fori_loop(1, count, farthest, index == first)
    start = (0, assign(chosen), jnp.array(True))
    return jax.lax.while_loop(lambda s: s[2] & (s[0] < 100), move, start)[1]


def _absorb(name: str, group: Group, survivor: jax.Array, found: dict[str, Any], stats: Mapping[str, Any]) -> None:
    """Add to the weights that read each survivor those that read its cluster."""
    mixing = (np.arange(group.size)[:, None] == survivor).astype(jnp.float32)
    for path, axis in group.consumers:
        if getattr(stats[path], "others", ()):
            raise ValueError(
                f"{path}: found a kernel that is used in several ways (tied), and new weights for one would change the "
                f"others; pass absorb=False, or leave {name!r} out of sparsity"
            )
        w, index = units.leaf(found, path, name), group.maps[path, axis]
        read = units.gather(w, axis, index, group.size)
        found[path] = units.scatter(w, axis, index, jnp.einsum("ij,j...->i...", mixing, read, precision="highest"))
