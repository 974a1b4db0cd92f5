"""How much each position of an activation counts, where a caller gave a mask or weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jcompress.trace.core.places import LOST, Places
from jcompress.trace.core.views import Atom, View
from jcompress.trace.recording.meetings import UnreadError


def of_places(view: Places, mask: Any, turns: Mapping[int, Any]) -> Any:
    """The weights of a value's positions, of size 1 along axes that have nothing to do with the mask.

    Args:
      view: where the positions stand in the mask.
      mask: booleans or weights.
      turns: of each loop around, the number of the turn.

    Raises:
      UnreadError: where the positions could not be followed.
    """
    if view is None:
        raise UnreadError(f"its positions cannot be matched with those of where, of shape {mask.shape}")
    found = {axis: _positions(view, axis, turns) for axis in range(mask.ndim)}
    missing = [axis for axis, at in found.items() if at is None]
    mask = _summed(mask, missing, view)
    at = [x for x in found.values() if x is not None]
    weights = mask[tuple(at)] if at else mask
    return jnp.broadcast_to(weights, jnp.broadcast_shapes(weights.shape, (1,) * len(view.dims)))


def _summed(mask: Any, axes: Sequence[int], view: View) -> Any:
    """The mask without axes over which an activation is a sum: such a sum counts if one of its terms does."""
    long = [axis for axis in axes if mask.shape[axis] > 1]
    lost = [d for d, atoms in enumerate(view.dims) if any(a.axis == LOST for a in atoms)]
    if long and lost:
        raise UnreadError(
            f"its positions along axis {lost[0]} cannot be matched with axis {long[0]} of where, of shape {mask.shape}"
        )
    if long and jnp.issubdtype(mask.dtype, jnp.floating):
        raise UnreadError(
            f"its positions are sums over axis {long[0]} of where, of shape {mask.shape}, and so have no weight of "
            "their own; give where as booleans, or calibrate it apart"
        )
    return mask.max(tuple(axes)) if axes else mask


def _positions(view: View, axis: int, turns: Mapping[int, Any]) -> Any:
    """The position along one axis of the mask, for each of the value; None if there is none."""
    ndim, total, many, is_found = len(view.dims), jnp.int32(0), 1, False
    for d, atoms in enumerate(view.dims):
        if any(a.axis == axis for a in atoms):
            is_found, many = True, many * math.prod(a.size for a in atoms if a.axis == axis)
            total = total + _run(atoms, axis).reshape([-1 if i == d else 1 for i in range(ndim)])
    for loop, atoms in view.scanned:
        if any(a.axis == axis for a in atoms):
            is_found, many = True, many * math.prod(a.size for a in atoms if a.axis == axis)
            total = total + _run(atoms, axis)[turns[loop]]
    for a in view.fixed:
        if a.axis == axis:
            is_found, total = True, total + a.offset
    if is_found and many > view.shape[axis]:
        raise UnreadError(f"axis {axis} of where stands for two of its axes")
    return total if is_found else None


def _run(atoms: Sequence[Atom], axis: int) -> Any:
    """The positions along one axis of the mask that an axis of a value runs over."""
    index = jnp.arange(math.prod(a.size for a in atoms), dtype=jnp.int32)
    total, inner = jnp.zeros_like(index), len(index)
    for a in atoms:
        inner //= a.size
        if a.axis == axis:
            total = total + a.offset + a.step * (index // inner % a.size)
    return total
