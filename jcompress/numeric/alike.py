"""What is done to many arrays of one shape, as one program: compile time that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.numeric.batches import apart

T = TypeVar("T")


def each(call: Callable[[int, Any], T], items: Sequence[Any], kinds: Sequence[Hashable], long: int = 100) -> list[T]:
    """``[call(i, item) for i, item in enumerate(items)]``, where it can be by a loop over those that are alike.

    Under ``jit`` XLA compiles a function anew for each array that it is called with. Items of one kind, structure and
    type are therefore stacked and taken one after the other by ``lax.map``, if the function is long enough to be worth
    the copies. These are bounded: of many items, an eighth is stacked at a time.

    Args:
      call: of a number and an item. In a loop the number is that of the first item.
      items: pytrees of arrays. Those with values that can be read now are never put into a loop.
      kinds: items of different kinds are not put together.
      long: the equations of a function that is worth a loop.
    """
    found: dict[int, T] = {}
    for members in _runs(items, kinds):
        first = members[0]
        if len(members) > 1 and _length_of(call, first, items[first]) >= long:
            found |= zip(members, _looped(partial(call, first), [items[i] for i in members]), strict=True)
        else:
            found |= {i: call(i, items[i]) for i in members}
    return [found[i] for i in range(len(items))]


def _looped(call: Callable[[Any], T], items: list[Any]) -> list[T]:
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *items)
    number, found = lax.scan(lambda i, item: (i + 1, call(item)), jnp.int32(0), stacked)
    places = apart(range(len(items)), number == 0)
    return [jax.tree.map(lambda x, i=i: lax.dynamic_index_in_dim(x, i, keepdims=False), found) for i in places]


def _runs(items: Sequence[Any], kinds: Sequence[Hashable]) -> Iterator[list[int]]:
    """The places of items that are alike, as many together as there is room for."""
    groups: dict[Hashable, list[int]] = {}
    for i, (item, kind) in enumerate(zip(items, kinds, strict=True)):
        own = _type(item)
        groups.setdefault(i if own is None else (kind, own), []).append(i)
    room = room_among(map(_size, items))
    for members in groups.values():
        length = max(room // max(_size(items[members[0]]), 1), 1)
        yield from (members[i : i + length] for i in range(0, len(members), length))


def room_among(sizes: Iterable[int]) -> int:
    """How much of arrays of these sizes may be in memory twice: an eighth of them, or a million numbers."""
    return max(sum(sizes) // 8, 1 << 20)


def _size(item: Any) -> int:
    return sum(getattr(x, "size", 1) for x in jax.tree.leaves(item))


def _type(item: Any) -> Hashable | None:
    """Structure, shapes, dtypes and shardings; None for an item that stays alone."""
    leaves, structure = jax.tree.flatten(item)
    if not all(isinstance(x, jax.core.Tracer) and _is_joinable(x.dtype) for x in leaves):
        return None
    return structure, tuple(map(jax.typeof, leaves))


def _is_joinable(dtype: Any) -> bool:
    """Whether arrays can be stacked: XLA aborts where it is to join integers of two bits on a CPU."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits >= 8
    return not jnp.issubdtype(dtype, jnp.integer) or jnp.iinfo(dtype).bits >= 8


def _length_of(call: Callable[[int, Any], Any], i: int, item: Any) -> int:
    return _length(jax.make_jaxpr(lambda item: jax.tree.leaves(call(i, item)))(item).jaxpr)


def _length(jaxpr: Any) -> int:
    """The equations of a program and of the programs inside it."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(eqn.params, is_leaf=_program)]
    return len(jaxpr.eqns) + sum(_length(getattr(x, "jaxpr", x)) for x in inner if _program(x))


def _program(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
