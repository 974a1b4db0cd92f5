"""How many units of each group stay so that a cost is met."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.layers.groups import Group

CostOfSizes = Callable[[Mapping[str, Any]], Any]
Order = Mapping[str, Any]
"""For each group the places of its units among all units, in the order in which they are kept."""


def model(groups: Mapping[str, Group], of: str | CostOfSizes) -> CostOfSizes:
    """The cost as a function of the sizes of groups."""
    if callable(of):
        return of
    if of not in ("multiply_adds", "bytes"):
        raise ValueError(f"keep: of={of!r} is unknown; use 'multiply_adds', 'bytes' or a function of the kept sizes")
    found = getattr(groups, of, None)
    if found is None:
        raise ValueError(
            f"keep: these groups do not know the {of.replace('_', '-')} of their function; pass all that "
            "jc.trace.coupling gave (scores say which are cut), or of= a function of the kept sizes"
        )
    return found


def places(x: jax.Array | np.ndarray) -> Any:
    """The place of each entry when the largest come first, NaN before all; of equal ones the lower index."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    order = xp.argsort(-xp.where(xp.isnan(x), xp.inf, x), stable=True)
    return xp.argsort(order, stable=True).astype(xp.int32)


def shared_order(scores: Mapping[str, jax.Array | np.ndarray]) -> Order:
    """All units by their scores, the highest first; ties go to the group that comes first and the lower index."""
    concrete = all(isinstance(x, np.ndarray) for x in scores.values())
    every = places((np if concrete else jnp).concatenate([*scores.values()]))
    ends = np.cumsum([x.size for x in scores.values()])
    return {name: every[end - x.size : end] for (name, x), end in zip(scores.items(), ends, strict=True)}


def even_order(sizes: Mapping[str, int]) -> Order:
    """Of every group the same share at every place, whatever the scores."""
    shares = np.concatenate([(np.arange(n) + 0.5) / n for n in sizes.values()])
    every = places(-shares)
    ends = np.cumsum(list(sizes.values()))
    return {name: every[end - n : end] for (name, n), end in zip(sizes.items(), ends, strict=True)}


def sizes_for(order: Order, cost: CostOfSizes, share: Any, round_to: Callable[[Any, int], Any]) -> dict[str, Any]:
    """The sizes at which the cost is nearest to a share of the whole.

    Args:
      order: the places of the units of each group.
      cost: of the sizes; it must not fall as they grow.
      share: of the cost when all units stay, in (0, 1].
      round_to: ``round_to(count, size)`` is the size that a group of ``size`` units gets for a count.
    """
    traced = not core.is_concrete(share) or any(not core.is_concrete(x) for x in order.values())
    xp = jnp if traced else np
    found = {name: xp.asarray(x) for name, x in order.items()}
    total = sum(len(x) for x in found.values())

    def sizes(count: Any) -> dict[str, Any]:
        """With the first units in the order."""
        first = {name: xp.sum(x < count) for name, x in found.items()}
        return {name: round_to(n if traced else int(n), len(found[name])) for name, n in first.items()}

    def at(count: Any) -> Any:
        return cost(sizes(count))

    target = share * at(total)
    find = _last_traced if traced else _last
    below = find(at, target, total)
    if not traced and at(0) > target:
        least, whole = at(0), at(total)
        raise ValueError(
            f"keep: found cost={share}, expected {least / whole:.4f} at least: that much stays when these groups are "
            "cut as far as at_least and multiple_of allow; score more groups, or allow more"
        )
    next_cost = at(xp.minimum(below + 1, total))
    above = find(at, next_cost, total)
    nearer = next_cost - target < target - at(below)
    return sizes(jnp.where(nearer, above, below) if traced else above if nearer else below)


def _last(at: Callable[[int], Any], target: Any, total: int) -> int:
    """The largest count whose cost is at most the target, or 0."""
    low, high = 0, total
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle - 1)
    return low


def _last_traced(at: Callable[[Any], Any], target: Any, total: int) -> jax.Array:
    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high + 1) // 2
        fits = at(middle) <= target * (1 + 2e-6)  # equal costs may differ in their last bits
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    turns = math.ceil(math.log2(total + 1)) + 1
    return jax.lax.fori_loop(0, turns, halve, (jnp.int32(0), jnp.int32(total)))[0]
