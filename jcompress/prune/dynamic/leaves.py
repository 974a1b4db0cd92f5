"""What a rule of sparse training knows about a leaf, and the pieces that rules are made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from jcompress.numeric import alike
from jcompress.numeric.counting import Count, counted, filled, pick
from jcompress.numeric.threshold import keep_largest, keep_random

T = TypeVar("T")


class Leaf(NamedTuple):
    """What is known about a leaf when its mask may change.

    Attributes:
      w: the weights; exactly 0.0 where the mask is False, after any step of training.
      mask: True for the weights that are active.
      grad: the dense gradient, also of weights that are not active.
      momentum: the moving average of dense gradients, or None if the rule reads none.
      step: the steps taken.
      key: a PRNG key of this leaf's and this step's own, or None if training was given none.
      kind: what leaves of one shape must have in common to be treated in one loop, as :func:`each` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import dynamic
      >>> w, mask = jnp.array([4.0, 0.1, 0.0, 0.0]), jnp.array([True, True, False, False])
      >>> leaf = dynamic.Leaf(w, mask, jnp.array([0.0, 0.0, 0.0, 9.0]), None, jnp.int32(0), jax.random.key(0))
      >>> leaf.mask.sum().item(), leaf.momentum is None
      (2, True)
    """

    w: jax.Array
    mask: jax.Array
    grad: jax.Array
    momentum: jax.Array | None
    step: jax.Array
    key: jax.Array | None
    kind: Hashable = None


@runtime_checkable
class Rule(Protocol):
    """How masks change: ``(leaves, memory) -> (masks, memory)``, with as many True in all as before.

    :class:`NeST` alone changes the number. Three things are optional: ``memory()`` gives what the rule remembers at the
    start; ``decay`` says that the rule reads the momentum, and at what rate it is to be averaged; and
    ``exchange(leaves, memory) -> (masks, survivors, memory)`` also tells which weights were not dropped. Without it, a
    weight that was active before and is active after has not been dropped, and keeps its value.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import dynamic
      >>> w, mask = jnp.array([4.0, 0.1, 0.0, 0.0]), jnp.array([True, True, False, False])
      >>> leaf = dynamic.Leaf(w, mask, jnp.array([0.0, 0.0, 0.0, 9.0]), None, jnp.int32(0), jax.random.key(0))
      >>> def rotate(leaves, memory):
      ...     return [jnp.roll(leaf.mask, 1) for leaf in leaves], memory
      >>> isinstance(rotate, dynamic.Rule), rotate([leaf], None)[0][0].tolist()
      (True, [False, True, True, False])
    """

    def __call__(self, leaves: Sequence[Leaf], memory: Any, /) -> tuple[list[jax.Array], Any]:
        """The new masks, one for each leaf."""
        ...


class Exchange:
    """A rule that says, in ``exchange``, which weights it dropped: grown again at once they start anew."""

    def exchange(self, found: Sequence[Leaf], memory: Any) -> tuple[list[jax.Array], list[jax.Array], Any]:
        """The new masks, what of the old ones was not dropped, and the memory."""
        raise NotImplementedError

    def __call__(self, found: Sequence[Leaf], memory: Any = (), /) -> tuple[list[jax.Array], Any]:
        """The new masks."""
        masks, _, memory = self.exchange(found, memory)
        return masks, memory


def each(call: Callable[..., T], found: Sequence[Leaf], *others: Sequence[Any]) -> list[T]:
    """``call(leaf, *other)`` for every leaf, compiled once for those that are alike.

    Args:
      call: of a leaf, and of what belongs to it.
      found: the leaves.
      *others: more for each leaf, arrays or pytrees of arrays.
    """

    def one(i: int, item: tuple[Any, ...]) -> T:
        leaf, *rest = item
        return call(leaf._replace(step=found[i].step, kind=found[i].kind), *rest)

    nothing: Any = None
    bare = [leaf._replace(step=nothing, kind=None) for leaf in found]
    return alike.each(one, list(zip(bare, *others, strict=True)), [leaf.kind for leaf in found])


Number = jax.Array | Count
"""A uint32 scalar, or a count that may be larger."""


def part(mask: jax.Array, fraction: Any) -> Count:
    """``floor(fraction * count)`` of a mask, no larger than the count."""
    total = counted(mask)
    wanted = jnp.floor(jnp.asarray(fraction, jnp.float32) * total.real())
    found = total.like(Count.near(jnp.maximum(wanted, 0)))
    return pick(total.reaches(found), found, total)


def drop_smallest(leaf: Leaf, number: Number) -> jax.Array:
    """The active weights without the ``number`` of smallest magnitude."""
    total = counted(leaf.mask)
    return keep_largest([leaf.w], total.left_after(total.like(number)), among=[leaf.mask], by=jnp.abs)[0]


def grow_largest(survivors: jax.Array, values: jax.Array, number: Number) -> jax.Array:
    """The survivors and the ``number`` of other weights whose values are largest in magnitude."""
    return survivors | keep_largest([values], number, among=[~survivors], by=jnp.abs)[0]


def grow_random(survivors: jax.Array, key: jax.Array | None, number: Number) -> jax.Array:
    """The survivors and ``number`` of the other weights, drawn at random."""
    if key is None:
        raise ValueError("the rule draws at random and has no key; give sparse(..., key=jax.random.key(0))")
    return survivors | keep_random(~survivors, number, key)


def apportion(total: Number, shares: jax.Array, room: Number) -> Any:
    """Integers in proportion to ``shares``, none above its ``room``, that add up to ``total`` exactly.

    What one cannot take goes to the others in proportion; the rounding's remainder goes in order.

    Args:
      total: uint32 scalar or count, at most the sum of ``room``.
      shares: non-negative float32 vector; equal shares if all are zero.
      room: uint32 vector or counts, as the total.

    Returns:
      A vector like ``room``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune.dynamic import leaves
      >>> leaves.apportion(jnp.uint32(10), jnp.array([1.0, 3.0, 1.0]), jnp.array([9, 4, 9], jnp.uint32)).tolist()
      [3, 4, 3]
    """
    if not isinstance(room, Count) or not isinstance(total, Count):
        none = Count(None, jnp.uint32(0))
        return apportion(none.like(total), shares, none.like(room)).low
    shares = jnp.where(jnp.sum(shares) > 0, shares, 1.0).astype(jnp.float32)
    wanted, limit = total.real(), room.real()

    def share(_: int, given: jax.Array) -> jax.Array:
        open_shares = jnp.where(given < limit, shares, 0.0)
        whole = jnp.sum(open_shares)
        more = (wanted - jnp.sum(given)) * open_shares / jnp.where(whole > 0, whole, 1.0)
        return jnp.minimum(given + more, limit)

    # Each round fills one at least, or gives all away.
    given = jax.lax.fori_loop(0, shares.size, share, jnp.zeros_like(limit))
    floors = room.like(Count.near(jnp.floor(given)))
    floors = pick(room.reaches(floors), floors, room)
    # Sums in float32 may be off either way: take back what is too much, then fill up in order.
    floors = filled(total, floors)
    rest = total.left_after(floors.sum())
    return floors.like(floors, filled(rest, room.left_after(floors)))
