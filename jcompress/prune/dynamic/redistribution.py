"""Rules that move weights between leaves: the total stays, the parts follow what each leaf needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.numeric.counting import Count, counted, mean_where
from jcompress.prune.dynamic import leaves
from jcompress.prune.dynamic.leaves import Leaf


@dataclasses.dataclass(frozen=True)
class SparseMomentum(leaves.Exchange):
    """Sparse momentum: leaves whose momentum is larger get more weights (Dettmers & Zettlemoyer 2019, 1907.04840).

    In each leaf ``floor(fraction * k)`` of the ``k`` active weights are dropped, those of smallest magnitude. What was
    dropped in all is shared out in proportion to the mean magnitude of the momentum over the active weights of each
    leaf, and grows where the momentum of weights that are not active is largest. What a leaf has no room for goes to
    the others. One that was just dropped may grow; it starts anew.

    Attributes:
      fraction: the part dropped, in [0, 1], or an optax schedule of it.
      decay: the rate at which dense gradients are averaged: ``m <- decay * m + (1 - decay) * g``. The average is held
        beside the optimizer, so any optimizer will do.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import dynamic
      >>> w, mask = jnp.array([4.0, 0.1, 0.0, 0.0]), jnp.array([True, True, False, False])
      >>> leaf = dynamic.Leaf(w, mask, jnp.zeros(4), jnp.array([1.0, 1.0, 0.0, 9.0]), jnp.int32(0), jax.random.key(0))
      >>> (new,), _ = dynamic.SparseMomentum(fraction=0.5)([leaf], None)
      >>> new.tolist()
      [True, False, False, True]
    """

    fraction: Any = 0.2
    decay: float = 0.9

    def exchange(self, found: Sequence[Leaf], memory: Any = ()) -> tuple[list[jax.Array], list[jax.Array], Any]:
        """The new masks, what of the old ones was not dropped, and the memory."""
        if not found:
            return [], [], memory
        fraction = core.value_at(self.fraction, found[0].step)
        survivors = leaves.each(lambda leaf: leaves.drop_smallest(leaf, leaves.part(leaf.mask, fraction)), found)
        shares = jnp.stack([mean_where(jnp.abs(_momentum(leaf)), leaf.mask) for leaf in found])
        numbers = _shared_out(found, survivors, shares)
        grown = leaves.each(lambda leaf, x, n: leaves.grow_largest(x, _momentum(leaf), n), found, survivors, numbers)
        return grown, survivors, memory


@dataclasses.dataclass(frozen=True)
class DSR(leaves.Exchange):
    """Dynamic sparse reparameterization: one threshold for all leaves (Mostafa & Wang 2019, 1902.05967).

    Active weights of a magnitude below the threshold are dropped. The threshold doubles if fewer were dropped than
    ``fraction * (1 - tolerance)`` of all active weights, and halves if more than ``fraction * (1 + tolerance)``. What
    was dropped in all grows at random, shared out in proportion to the weights that each leaf has left. One that was
    just dropped may grow; it starts anew.

    Attributes:
      fraction: the part of all active weights that should be dropped each time.
      tolerance: how far off that may be before the threshold moves.
      threshold: the first threshold.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import dynamic
      >>> w, mask = jnp.array([4.0, 0.1, 0.0, 0.0]), jnp.array([True, True, False, False])
      >>> leaf = dynamic.Leaf(w, mask, jnp.array([0.0, 0.0, 0.0, 9.0]), None, jnp.int32(0), jax.random.key(0))
      >>> rule = dynamic.DSR(threshold=1.0)
      >>> (new,), threshold = rule([leaf], rule.memory())
      >>> bool(new[0]), int(new.sum())
      (True, 2)
    """

    fraction: Any = 0.01
    tolerance: float = 0.1
    threshold: float = 1e-3

    def memory(self) -> jax.Array:
        """The threshold at the start."""
        return jnp.float32(self.threshold)

    def exchange(self, found: Sequence[Leaf], memory: Any) -> tuple[list[jax.Array], list[jax.Array], Any]:
        """The new masks, what of the old ones was not dropped, and the threshold."""
        if not found:
            return [], [], memory
        survivors = [leaf.mask & (jnp.abs(leaf.w).astype(jnp.float32) >= memory) for leaf in found]
        active = jnp.sum(_numbers([leaf.mask for leaf in found]).real())
        remaining = _numbers(survivors).real()
        share = (active - jnp.sum(remaining)) / jnp.maximum(active, 1)
        fraction = core.value_at(self.fraction, found[0].step)
        factor = jnp.where(share < fraction * (1 - self.tolerance), 2.0, 1.0)
        factor = jnp.where(share > fraction * (1 + self.tolerance), 0.5, factor)
        numbers = _shared_out(found, survivors, remaining)
        grown = leaves.each(lambda leaf, x, n: leaves.grow_random(x, leaf.key, n), found, survivors, numbers)
        return grown, survivors, memory * factor


def _momentum(leaf: Leaf) -> jax.Array:
    if leaf.momentum is None:
        raise ValueError("SparseMomentum reads the momentum, which is missing: give the leaves one")
    return leaf.momentum


def _shared_out(found: Sequence[Leaf], survivors: list[jax.Array], shares: jax.Array) -> list[Count]:
    """How many each leaf is to grow, of as many as were dropped in all."""
    left, before = _numbers(survivors), _numbers([leaf.mask for leaf in found])
    dropped = before.left_after(left).sum()
    given = leaves.apportion(dropped, shares, _numbers([~x for x in survivors]))
    return [jax.tree.map(lambda x, i=i: x[i], given) for i in range(len(found))]


def _numbers(masks: Sequence[jax.Array]) -> Count:
    """How many of each are True, in a form that holds their sum."""
    counts = [counted(x).within(sum(x.size for x in masks)) for x in masks]
    return jax.tree.map(lambda *x: jnp.stack(x), *counts)
