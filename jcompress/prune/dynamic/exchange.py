"""Rules that exchange weights inside each leaf: drop the smallest, grow as many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.numeric.counting import Count
from jcompress.prune.dynamic import leaves
from jcompress.prune.dynamic.leaves import Leaf


@dataclasses.dataclass(frozen=True)
class Static:
    """Masks that stay as they are: fixed sparse training, as of lottery tickets.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import dynamic
      >>> w, mask = jnp.array([4.0, 0.1, 0.0, 0.0]), jnp.array([True, True, False, False])
      >>> leaf = dynamic.Leaf(w, mask, jnp.array([0.0, 0.0, 0.0, 9.0]), None, jnp.int32(0), jax.random.key(0))
      >>> (new,), _ = dynamic.Static()([leaf], None)
      >>> new.tolist()
      [True, True, False, False]
    """

    def __call__(self, found: Sequence[Leaf], memory: Any = (), /) -> tuple[list[jax.Array], Any]:
        """The same masks."""
        return [leaf.mask for leaf in found], memory


@dataclasses.dataclass(frozen=True)
class SET(leaves.Exchange):
    """Sparse evolutionary training: drop the smallest weights, grow as many at random (Mocanu et al. 2018, 1707.04780).

    In each leaf ``floor(fraction * k)`` of the ``k`` active weights are dropped, those of smallest magnitude, and as
    many are drawn uniformly from all that are then not active. One that was just dropped may be drawn; it starts anew.

    Attributes:
      fraction: the part exchanged, in [0, 1], or an optax schedule of it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import dynamic
      >>> w, mask = jnp.array([4.0, 0.1, 0.0, 0.0]), jnp.array([True, True, False, False])
      >>> leaf = dynamic.Leaf(w, mask, jnp.array([0.0, 0.0, 0.0, 9.0]), None, jnp.int32(0), jax.random.key(0))
      >>> (new,), _ = dynamic.SET(fraction=0.5)([leaf], None)
      >>> bool(new[0]), int(new.sum())
      (True, 2)
    """

    fraction: Any = 0.3

    def exchange(self, found: Sequence[Leaf], memory: Any = ()) -> tuple[list[jax.Array], list[jax.Array], Any]:
        """The new masks, what of the old ones was not dropped, and the memory."""
        fraction = core.value_at(self.fraction, found[0].step) if found else 0

        def one(leaf: Leaf) -> tuple[jax.Array, jax.Array]:
            survivors, number = _dropped(leaf, fraction)
            return leaves.grow_random(survivors, leaf.key, number), survivors

        moved = leaves.each(one, found)
        return [masks for masks, _ in moved], [survivors for _, survivors in moved], memory


@dataclasses.dataclass(frozen=True)
class RigL:
    """Rigged lottery: drop the smallest weights, grow where the gradient is largest (Evci et al. 2020, 1911.11134).

    At step ``t`` the part exchanged in each leaf is ``fraction / 2 * (1 + cos(pi * t / stop))``; from ``stop`` on the
    masks stay. A weight may be grown again in the step that drops it; then it keeps its value, as in the authors' code.

    Attributes:
      stop: the step after which masks stay; three quarters of the training, in the paper.
      fraction: the part exchanged at the start, or an optax schedule that takes the place of the cosine.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import dynamic
      >>> w, mask = jnp.array([4.0, 0.1, 0.0, 0.0]), jnp.array([True, True, False, False])
      >>> leaf = dynamic.Leaf(w, mask, jnp.array([0.0, 0.0, 0.0, 9.0]), None, jnp.int32(0), jax.random.key(0))
      >>> (new,), _ = dynamic.RigL(stop=100, fraction=0.5)([leaf], None)
      >>> new.tolist()
      [True, False, False, True]
    """

    stop: Any
    fraction: Any = 0.3

    def fraction_at(self, step: jax.Array) -> jax.Array:
        """The part exchanged at a step.

        Example:
          >>> import jcompress as jc
          >>> rule = jc.prune.dynamic.RigL(stop=100, fraction=0.4)
          >>> [round(float(rule.fraction_at(step)), 2) for step in (0, 50, 100)]
          [0.4, 0.2, 0.0]
        """
        if callable(self.fraction):
            return jnp.where(step < self.stop, self.fraction(step), 0.0)
        turn = jnp.clip(jnp.asarray(step, jnp.float32) / self.stop, 0.0, 1.0)
        return jnp.where(turn < 1, self.fraction / 2 * (1 + jnp.cos(jnp.pi * turn)), 0.0)

    def __call__(self, found: Sequence[Leaf], memory: Any = (), /) -> tuple[list[jax.Array], Any]:
        """The new masks."""
        fraction = self.fraction_at(found[0].step) if found else 0

        def one(leaf: Leaf) -> jax.Array:
            survivors, number = _dropped(leaf, fraction)
            return leaves.grow_largest(survivors, leaf.grad, number)

        return leaves.each(one, found), memory


def _dropped(leaf: Leaf, fraction: Any) -> tuple[jax.Array, Count]:
    """What is left of the active weights, and how many were dropped."""
    number = leaves.part(leaf.mask, fraction)
    return leaves.drop_smallest(leaf, number), number
