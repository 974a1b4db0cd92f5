"""Importance that diffuses through the graph of layers, and the penalty weighted by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group
from jcompress.layers.units import Members

Edges = list[tuple[str, str, jax.Array]]


def diffusion(
    params: PyTree,
    groups: Mapping[str, Group],
    chain: Sequence[str],
    restart: Mapping[str, jax.Array] | None = None,
    damping: float = 0.85,
    tolerance: float = 1e-7,
) -> dict[str, jax.Array]:
    """Importance by personalized PageRank on the graph whose nodes are units and whose edges are weights.

    A walker at a unit steps to one of those that feed it, with a probability in proportion to the magnitude of the
    weights between. With probability ``1 - damping``, and wherever nothing feeds it, it starts anew:
    ``p = (1 - damping) v + damping (P' p + p_end v)``, with P the steps, v the start and ``p_end`` the mass on units
    that nothing feeds. The fixed point is found by iteration, exactly after a round a layer where no layer feeds
    itself. Units that much of the outputs depends on score high.

    After hybrid pruning and sparsification (Tavakoli et al. 2021, ICIP), whose abstract names graph diffusion as the
    importance of neurons; graph, start and damping are our choice. Scores of groups of unlike size compare after
    ``keep(..., normalize="mean")``. Works under ``jit``.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``; those that cannot be cut are nodes as well.
      chain: the paths of kernels whose last axis is their output, in any order; branches and residual sums may be
        among them.
      restart: ``{name: (size,)}``, where the walker starts, in any scale; by default evenly on the units that no kernel
        of the chain reads, the outputs.
      damping: the probability to go on, in [0, 1).
      tolerance: the iteration ends when all changes together are below it.

    Returns:
      ``{name: float32 (size,)}`` for every group that the chain touches. All of them together sum to 1.

    Raises:
      ValueError: for a kernel whose inputs or outputs are in no group, or a damping outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[3.0], [-1.0]])}
      >>> groups = {
      ...     "x": jc.trace.Group(size=1, consumers=(("a", 0),), reason="it is fixed"),
      ...     "hidden": jc.trace.Group(size=2, producers=(("a", 1),), consumers=(("b", 0),)),
      ...     "y": jc.trace.Group(size=1, producers=(("b", 1),), reason="it is fixed"),
      ... }
      >>> score = structured.diffusion(params, groups, ["a", "b"])["hidden"]
      >>> [round(float(x), 3) for x in score / score.sum()]
      [0.75, 0.25]
    """
    if not 0 <= damping < 1:
        raise ValueError(f"diffusion: damping={damping} is outside [0, 1)")
    edges = list(_edges(units.leaves(params), groups, chain))
    names = list(dict.fromkeys(name for edge in edges for name in edge[:2]))
    fed = {name: jnp.zeros(groups[name].size, jnp.float32) for name in names}
    for _, out, weights in edges:
        fed[out] = fed[out] + weights.sum(axis=0)
    start = _start(groups, names, edges, restart)

    def step(p: dict[str, jax.Array]) -> dict[str, jax.Array]:
        share = {name: jnp.where(fed[name] > 0, p[name] / jnp.where(fed[name] > 0, fed[name], 1), 0) for name in names}
        moved = {name: jnp.zeros_like(p[name]) for name in names}
        for source, out, weights in edges:
            moved[source] = moved[source] + jnp.matmul(weights, share[out], precision="highest")
        return {name: start[name] + damping * moved[name] for name in names}

    # What ends returns to the start, which scales the whole: (I - damping P') p is v times a number.
    p = _fixed_point(step, start, tolerance)
    total = sum(jnp.sum(x) for x in p.values())
    return {name: x / total for name, x in p.items()}


def _fixed_point(step: Any, start: dict[str, jax.Array], tolerance: float) -> dict[str, jax.Array]:
    def body(state: tuple) -> tuple:
        n, p, _ = state
        new = step(p)
        return n + 1, new, sum(jnp.sum(jnp.abs(new[name] - p[name])) for name in p)

    # Rounding may keep the last changes above the tolerance.
    state = (0, start, jnp.array(jnp.inf))
    return jax.lax.while_loop(lambda s: (s[2] > tolerance) & (s[0] < 10_000), body, state)[1]


def _edges(
    found: Mapping[str, Any], groups: Mapping[str, Group], chain: Sequence[str]
) -> Iterator[tuple[str, str, jax.Array]]:
    """What feeds what: (group that is read, group that is written, magnitudes between their units)."""
    for path in chain:
        w = jnp.abs(units.leaf(found, path, "chain").astype(jnp.float32))
        last = w.ndim - 1
        reads = [(n, axis) for n, g in groups.items() for p, axis in g.consumers if p == path]
        writes = [n for n, g in groups.items() if (path, last) in g.producers]
        if not reads or not writes:
            raise ValueError(
                f"{path}: no group {'writes' if reads else 'reads'} this kernel of shape {w.shape}; leave it out of "
                "the chain, or add a jc.trace.Group for its first and last layer's units"
            )
        for name, axis in reads:
            for out in writes:
                yield name, out, _between(w, axis % w.ndim, groups[name], groups[out], path)


def _between(w: jax.Array, axis: int, source: Group, out: Group, path: str) -> jax.Array:
    """The sum of magnitudes between each two units: (units read, units written)."""
    last = w.ndim - 1
    rows = units.gather(w, axis, source.maps[path, axis], source.size)
    rows = rows.reshape(source.size, -1, w.shape[last]).sum(axis=1)
    return jax.vmap(lambda row: units.totals(row, 0, out.maps[path, last], out.size))(rows)


def _start(
    groups: Mapping[str, Group], names: list[str], edges: Edges, restart: Mapping[str, jax.Array] | None
) -> dict[str, jax.Array]:
    """Where the walker starts, summing to 1."""
    if restart is None:
        read = {source for source, _, _ in edges}
        restart = {name: jnp.ones(groups[name].size, jnp.float32) for name in names if name not in read}
    unknown = sorted(set(restart) - set(names))
    if unknown or not restart:
        told = f"{unknown[0]}: the chain does not touch this group" if unknown else "the chain has no end"
        raise ValueError(f"{told}; give restart= for some of {names}")
    none = {name: jnp.zeros(groups[name].size, jnp.float32) for name in names}
    start = {name: jnp.asarray(restart.get(name, none[name]), jnp.float32) for name in names}
    total = sum(jnp.sum(x) for x in start.values())
    return {name: x / total for name, x in start.items()}


def weighted_penalty(
    params: PyTree,
    groups: Mapping[str, Group],
    scores: Mapping[str, jax.Array],
    l1: float | jax.Array,
    l2: float | jax.Array = 0.0,
    members: Members = "kernels",
    match: str = ".*",
) -> jax.Array:
    """A penalty that presses on unimportant units, ``sum_i c_i sum_{w of i} (l1 |w| + l2 w**2)``.

    With ``c_i = 1 - s_i / max_j s_j`` in each group: the most important unit is free, one without importance pays in
    full. Add it to the loss while fine-tuning, then prune by magnitude: the second half of hybrid pruning and
    sparsification (Tavakoli et al. 2021, ICIP), whose weighting is not in its abstract; this one is ours.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      scores: ``{name: (size,)}``, not negative; held constant under differentiation.
      l1: of magnitudes.
      l2: of squares.
      members: as for :func:`importance`.
      match: as for :func:`importance`.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for a group that is unknown or has no such members.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[1.0, -2.0, 3.0]])}
      >>> hidden = jc.trace.Group(size=3, producers=(("a", 1),))
      >>> scores = {"hidden": jnp.array([0.0, 1.0, 2.0])}
      >>> float(structured.weighted_penalty(params, {"hidden": hidden}, scores, l1=1.0, l2=0.5))
      3.5
    """
    found, total = units.leaves(params), jnp.zeros((), jnp.float32)
    for name, score in scores.items():
        if name not in groups:
            raise ValueError(f"{name}: there is no such group; {units.closest(name, groups)}")
        score = jax.lax.stop_gradient(jnp.asarray(score, jnp.float32))
        most = jnp.max(score)
        weight = 1 - score / jnp.where(most > 0, most, 1)
        for path, axis in units.chosen(name, groups[name], members, match, found):
            w = units.leaf(found, path, name).astype(jnp.float32)
            costs = units.totals(l1 * jnp.abs(w) + l2 * jnp.square(w), axis, groups[name].maps[path, axis], len(weight))
            total = total + jnp.sum(weight * costs)
    return total
