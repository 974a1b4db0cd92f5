"""Second moments kept as two factors, as Adafactor does: for the two longest axes, the means over either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]

USUAL = 128
"""The length of the second longest axis from which optimizers factor, unless they are told another."""


def is_factored(x: Any) -> bool:
    """Whether a state holds second moments as factors (or whole, where that is shorter)."""
    return all(hasattr(x, name) for name in ("_replace", "v_row", "v_col", "v"))


def _longest(shape: Shape) -> tuple[int, int]:
    """The second longest axis, and the longest."""
    order = np.argsort(shape)
    return int(order[-2]), int(order[-1])


def threshold(moments: Mapping[str, Any], full: Mapping[str, Shape | None]) -> Callable[[Shape], bool | None]:
    """Which shapes an optimizer factors, from what it did with others; None where that does not tell."""
    seen = {True: [1 << 62], False: [0]}
    for key, x in moments.items():
        shape = full[key]
        if shape is not None and len(shape) > 1:
            seen[jnp.shape(x) != shape].append(shape[_longest(shape)[0]])
    whole, factored = max(seen[False]), min(seen[True])

    def is_factored_at(shape: Shape) -> bool | None:
        if factored == 1 << 62 or len(shape) < 2:
            return False
        least = shape[_longest(shape)[0]]
        if whole < USUAL <= factored:
            return least >= USUAL
        return True if least >= factored else False if least <= whole else None

    return is_factored_at


def fits(each: tuple[Any, Any, Any], full: Shape) -> bool:
    """Whether the factors, or the whole moment, are those of a parameter of this shape."""
    rows, columns, moment = map(jnp.shape, each)
    if moment == full:
        return True
    if len(full) < 2:
        return False
    second, first = _longest(full)
    return (rows, columns) == (_without(full, first), _without(full, second))


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def cut(each: tuple[Any, ...], full: Shape, sliced: Callable[[Any], Any], is_factored: bool) -> tuple[Any, Any, Any]:
    """The factors of a smaller second moment: those of what the estimate of each entry that stays was.

    With the longest axes ``i`` and ``j``, the estimate is ``v[i, j] = row[j] / mean(row) * column[i]``.
    """
    rows, columns, moment = each
    if jnp.shape(moment) == full:
        moment, none = sliced(moment), jnp.zeros((1,), jnp.result_type(moment))
    else:
        none, (second, first) = moment, _longest(full)
        mean = rows.mean(second - (second > first), keepdims=True)
        share = jnp.where(mean > 0, rows / jnp.where(mean > 0, mean, 1), 1)
        moment = sliced(jnp.expand_dims(share, first) * jnp.expand_dims(columns, second))
    if not is_factored:
        return none, none, moment
    second, first = _longest(jnp.shape(moment))
    return moment.mean(first), moment.mean(second), none
