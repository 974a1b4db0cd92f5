"""Neurons that compute the same, merged without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group
from jcompress.numeric import extremes, scaling
from jcompress.prune.masks import selection


def merge_neurons(
    params: PyTree, groups: Mapping[str, Group], sparsity: Any, match: str = ".*"
) -> tuple[dict[str, jax.Array], PyTree]:
    """Merge the neurons that are most alike, without data (Srinivas & Babu 2015, arXiv:1507.06149).

    With ``w_i`` all weights that compute neuron i, its bias among them, and ``a_i`` all that read it, the pair of
    least saliency ``s_ij = mean(a_j**2) ||w_i - w_j||**2`` is merged, ``a_i <- a_i + a_j``, and j is cut; again, until
    enough are. Identical neurons merge exactly. What lies between the two layers must treat each neuron alone and all
    alike: activations, pooling and batch norm (its parameters are among ``w_i``), but not layer norm.

    Works under ``jit``, with a traced sparsity.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``; all prunable ones are treated.
      sparsity: the fraction of neurons to cut, in [0, 1], of each group, or ``{name: fraction}`` for some groups.
      match: a regular expression for the paths of the weights that compute a neuron.

    Returns:
      ``(keep, new_params)``: ``{name: bool (size,)}``, and the parameters with the weights that read merged. At least
      one neuron of each group stays.

    Raises:
      ValueError: for a sparsity outside [0, 1], a group that is unknown or cannot be cut, or one that no kernel reads.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress import rewrite
      >>> params = {"a": jnp.array([[1.0, 5.0, 1.0]]), "b": jnp.array([[1.0], [2.0], [3.0]])}
      >>> hidden = jc.trace.Group(size=3, producers=(("a", 1),), consumers=(("b", 0),))
      >>> keep, merged = rewrite.merge_neurons(params, {"hidden": hidden}, sparsity=1 / 3)
      >>> keep["hidden"].tolist(), merged["b"].ravel().tolist()
      ([True, True, False], [4.0, 2.0, 0.0])
    """
    fractions = dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(units.prunable(groups), sparsity)
    found, keep = units.leaves(params), {}
    for name, fraction in fractions.items():
        group = units.find(groups, name)
        if core.is_concrete(fraction):
            selection.check_sparsity(f"{name}: merge_neurons", fraction)
        mixing, keep[name] = _merged(name, group, fraction, match, found)
        for path, axis in group.consumers:
            index = group.maps[path, axis]
            read = units.gather(units.leaf(found, path, name), axis, index, group.size)
            mixed = jnp.einsum("ij,j...->i...", mixing, read, precision="highest")
            found[path] = units.scatter(units.leaf(found, path, name), axis, index, mixed)
    return keep, units.replace(params, found)


def _merged(
    name: str, group: Group, fraction: Any, match: str, found: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """The matrix that maps old outgoing weights to new ones, and who stays."""
    computing = units.rows(name, group, units.chosen(name, group, "producers", match, found), found)
    reading = units.rows(name, group, units.chosen(name, group, "consumers", ".*", found), found)
    computing, reading = (scaling.unit([x]).divide(x) for x in (computing, reading))  # only their order counts
    products = jnp.matmul(reading, reading.T, precision="highest") / max(reading.shape[1], 1)
    apart, others = units.distances(computing), ~np.eye(group.size, dtype=bool)

    def merge(_: Any, state: tuple) -> tuple:
        mixing, products, keep = state
        saliency = jnp.where(keep[:, None] & keep & others, apart * jnp.diag(products), jnp.inf)
        i, j = jnp.unravel_index(extremes.argmin(saliency), saliency.shape)
        mixing = mixing.at[i].add(mixing[j]).at[j].set(0)
        products = products.at[i].add(products[j]).at[j].set(0)
        products = products.at[:, i].add(products[:, j]).at[:, j].set(0)
        return mixing, products, keep.at[j].set(False)

    cut = jnp.minimum(group.size - jnp.asarray(selection.kept(group.size, fraction), jnp.int32), group.size - 1)
    start = (jnp.eye(group.size, dtype=jnp.float32), products, jnp.ones(group.size, bool))
    mixing, _, keep = jax.lax.fori_loop(0, cut, merge, start)
    return mixing, keep
