"""What the losses share: pairs of features that are checked, means over positions, and units with finite slopes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import rules
from jcompress.core import PyTree

Same = Literal["shape", "positions", "batch"]
EXPECTED = {"shape": "equal shapes", "positions": "equal shapes but for the last axis", "batch": "equal batches"}


def wide(x: Any) -> jax.Array:
    """An array in float32 at least."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def fixed(x: Any) -> jax.Array:
    """A teacher's array: in float32 at least, and no gradient reaches it."""
    return jax.lax.stop_gradient(wide(x))


def pairs(name: str, student: PyTree, teacher: PyTree, same: Same = "shape") -> list[tuple[jax.Array, jax.Array]]:
    """The arrays of two trees of features, the teacher's fixed.

    Raises:
      ValueError: for trees of other structure, or shapes that do not fit.
    """
    ours, theirs = rules.paths(student), rules.paths(teacher)
    if not same_structure(student, teacher):
        told = [", ".join(path for path, _ in found) or "one array" for found in (ours, theirs)]
        raise ValueError(f"{name}: found features {told[0]}, the teacher's are {told[1]}; give pairs, say by layer_map")
    for (path, s), (_, t) in zip(ours, theirs, strict=True):
        if _seen(s, same) != _seen(t, same):
            raise ValueError(
                f"{name}: {path + ': ' if path else ''}found shape {jnp.shape(s)}, the teacher's is {jnp.shape(t)}; "
                f"expected {EXPECTED[same]}"
            )
    return [(wide(s), fixed(t)) for (_, s), (_, t) in zip(ours, theirs, strict=True)]


def same_structure(a: PyTree, b: PyTree) -> bool:
    """Whether two trees differ in their leaves only."""
    structures: list[Any] = [jax.tree.structure(a), jax.tree.structure(b)]
    return bool(structures[0] == structures[1])


def _seen(x: Any, same: Same) -> Any:
    shape = jnp.shape(x)
    return {"shape": shape, "positions": (len(shape), shape[:-1]), "batch": shape[:1]}[same]


def summed(terms: Any) -> jax.Array:
    """The sum of scalars, 0 of none."""
    return sum(terms, start=jnp.float32(0))


def averaged(x: jax.Array, where: Any = None) -> jax.Array:
    """The mean, or that over the positions that count: ``where`` holds booleans or weights for leading axes of ``x``.

    What does not count gives no value. Make it :func:`counted` before, and it may hold anything.
    """
    if where is None:
        return jnp.mean(x)
    where = jnp.asarray(where)
    weight = where.astype(x.dtype)
    seen = jnp.where(spread(weight > 0, x), x, 0)
    each = jnp.mean(seen, axis=tuple(range(where.ndim, x.ndim)))
    total = jnp.sum(weight)
    return jnp.sum(each * weight) / jnp.where(total > 0, total, 1)


def spread(where: jax.Array, x: jax.Array) -> jax.Array:
    """``where`` with axes of length 1 behind, so that it broadcasts against ``x``."""
    return where.reshape(where.shape + (1,) * (x.ndim - where.ndim))


def counted(x: jax.Array, where: Any) -> jax.Array:
    """Zeros in place of what does not count, so that no NaN of a padded position has a gradient.

    Raises:
      ValueError: if the shape of ``where`` is not that of leading axes.
    """
    if where is None:
        return x
    where = jnp.asarray(where)
    if where.shape != x.shape[: where.ndim]:
        raise ValueError(f"where: found shape {where.shape}, expected leading axes of {x.shape}")
    return jnp.where(spread(where > 0, x), x, 0)


def rows(x: jax.Array) -> jax.Array:
    """(batch, features): what follows the batch, flattened."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def unit(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """``x / ||x||``, zero where ``x`` is, with a slope of 0 there. Neither overflows nor underflows."""
    most = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    x = x / jnp.where(most > 0, most, 1)
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL of two log probabilities, over the last axis: ``sum p (log p - log q)``. What has no probability adds none."""
    p = jnp.exp(teacher)
    return jnp.sum(jnp.where(p > 0, p * (teacher - student), 0), axis=-1)


def positive(name: str, what: str, value: Any) -> None:
    """Check that a number, where it is known, is positive.

    Raises:
      ValueError: if it is not.
    """
    if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name}: found {what} {value}, expected a positive number")


def applied(name: str, modules: PyTree, features: PyTree) -> PyTree:
    """Features through a function, or each of a tree through the function at its place; None changes nothing.

    Raises:
      ValueError: if there is not one function for each array.
    """
    if modules is None:
        return features
    leaves, tree = jax.tree.flatten(features)
    functions = jax.tree.leaves(modules, is_leaf=callable)
    if len(functions) not in (1, len(leaves)) or not all(map(callable, functions)):
        raise ValueError(f"{name}: found {len(functions)} maps of {len(leaves)} arrays, expected a function for each")
    each: list[Callable[[Any], Any]] = functions if len(functions) > 1 else functions * len(leaves)
    return jax.tree.unflatten(tree, [fn(wide(x)) for fn, x in zip(each, leaves, strict=True)])
