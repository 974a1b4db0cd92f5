"""Scores of units from what they put out, and from what becomes of it further on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import PyTree
from jcompress.layers import consumers, units
from jcompress.layers.groups import Group


def apoz(params: PyTree, groups: Mapping[str, Group], stats: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The share of positions at which a unit is not zero: ``1 - APoZ`` (Hu et al. 2016, arXiv:1607.03250).

    APoZ, the average percentage of zeros, is ``mean 1[output = 0]`` over examples and positions, as the next layers
    meet it; with several of them, their mean. A unit that is dead scores 0, and cutting it changes nothing. What a
    convolution pads with are zeros too: of its kernel positions the one that meets the fewest counts.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      stats: ``{path: statistics}``; of these ``zeros``, ``count`` and ``axes`` are read.

    Returns:
      ``{name: float32 (size,)}``, in [0, 1].

    Example:
      >>> import types, jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),), consumers=(("b", 0),))
      >>> stats = {"b": types.SimpleNamespace(zeros=jnp.array([2, 8]), count=8, axes=(0,))}
      >>> structured.apoz(params, {"hidden": hidden}, stats)["hidden"].tolist()
      [0.75, 0.0]
    """
    found = units.leaves(params)
    return {name: 1 - _zeros(name, group, found, stats) for name, group in units.prunable(groups).items()}


def _zeros(name: str, group: Group, found: Mapping[str, Any], stats: Mapping[str, Any]) -> jax.Array:
    """The share of zeros of each unit, the mean over the kernels that read it."""
    shares = []
    for layer, axis in consumers.consumers(name, group, found, stats, "zeros"):
        stat, index = layer.stat, group.maps[layer.path, axis]
        count = jnp.maximum(jnp.reshape(stat.count, (-1, 1)), 1).astype(jnp.float32)
        share = jnp.mean(jnp.reshape(stat.zeros, (-1, math.prod(layer.shape))) / count, axis=0)
        place = layer.axes.index(axis % layer.w.ndim)
        others = tuple(i for i in range(len(layer.axes)) if i != place)
        along = jnp.min(share.reshape(layer.shape), axis=others)
        entries = np.maximum(np.bincount(index[index >= 0], minlength=group.size), 1).astype(np.float32)
        shares.append(units.totals(along, 0, index, group.size) / entries)
    return jnp.mean(jnp.stack(shares), axis=0)


def nisp(
    params: PyTree, groups: Mapping[str, Group], chain: Sequence[str], final: jax.Array | Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Importance carried back from the last layer, ``s_k = |W_{k+1}|' s_{k+1}`` (NISP; Yu et al. 2018, 1711.05908).

    A unit matters as much as what it feeds, each in proportion to the magnitude of the weight between. In a linear
    network with positive weights that is the sum over all paths to the outputs. Activations count as the identity, and
    norms as well: the paper bounds what Lipschitz activations do.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``, or by hand; also those that cannot be cut pass importance on.
      chain: the paths of kernels whose last axis is their output, from the first layer to the last. Branches are
        allowed, if every kernel stands before those that read what it puts out.
      final: the importance of the outputs of the last kernel, or ``{path: (n,)}`` for several that end the network.

    Returns:
      ``{name: float32 (size,)}`` for each group that a kernel of the chain reads.

    Raises:
      ValueError: for a kernel that no group says how to read, or whose outputs have no importance.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[1.0, -2.0], [0.5, 0.0]])}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),), consumers=(("b", 0),))
      >>> structured.nisp(params, {"hidden": hidden}, ["a", "b"], final=jnp.ones(2))["hidden"].tolist()
      [3.0, 0.5]
    """
    found, scores = units.leaves(params), dict[str, jax.Array]()
    ends = dict(final) if isinstance(final, Mapping) else {chain[-1]: final}
    for path in reversed(chain):
        w = jnp.abs(units.leaf(found, path, "chain").astype(jnp.float32))
        weighted = w * _outputs(path, w, groups, scores, ends)
        for name, group in groups.items():
            for consumer, axis in group.consumers:
                if consumer == path:
                    added = units.totals(weighted, axis, group.maps[path, axis], group.size)
                    scores[name] = scores.get(name, jnp.zeros(group.size, jnp.float32)) + added
    return scores


def _outputs(
    path: str, w: jax.Array, groups: Mapping[str, Group], scores: Mapping[str, jax.Array], ends: Mapping[str, jax.Array]
) -> jax.Array:
    """The importance of a kernel's outputs, along its last axis."""
    known = [jnp.broadcast_to(jnp.asarray(ends[path], jnp.float32), w.shape[-1:])] if path in ends else []
    for name, group in groups.items():
        for member, axis in group.producers:
            if member == path and axis % w.ndim == w.ndim - 1 and name in scores:
                known.append(units.spread(scores[name], 0, group.maps[path, axis], 1, 0.0))
    if not known:
        raise ValueError(
            f"{path}: nothing later in the chain reads what it puts out; order the chain from first to last, or give "
            "its importance in final="
        )
    return sum(known[1:], known[0])
