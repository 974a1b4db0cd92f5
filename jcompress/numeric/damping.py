"""Cholesky factors of Gram matrices that may be singular: more is added to the diagonal, until they exist."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.numeric import scaling

_TRIES = 9
_EPSILON = float(jnp.finfo(jnp.float32).eps)


def damped(gram: jax.Array, damping: Any) -> jax.Array:
    """The Gram matrix (k, k) plus ``damping`` times its mean diagonal.

    Inputs that were never seen get the mean of the others on their diagonal, and 1 where none was seen: there the
    weights alone decide. Near the ends of float32 it comes in units of its own, which no decision depends on.
    """
    gram = scaling.of(jnp.max(jnp.diagonal(gram), initial=0)).divide(gram)
    diagonal = jnp.diagonal(gram)
    mean = jnp.sum(diagonal / len(gram))
    mean = jnp.where(mean > 0, mean, 1)
    return gram + jnp.diag(damping * mean + jnp.where(diagonal > 0, 0, filled(diagonal)))


def filled(energy: jax.Array) -> jax.Array:
    """The energies of inputs, (..., k), with those never seen, 0, taken for the mean of the others: 1 if there is none.

    Stacked layers or experts that saw nothing take the mean of all.
    """
    seen = energy > 0

    def mean(axis: int | None) -> jax.Array:
        count = jnp.maximum(jnp.sum(seen, axis=axis, keepdims=True), 1)
        return jnp.sum(jnp.where(seen, energy / count, 0), axis=axis, keepdims=True)

    own, others = mean(-1), mean(None)
    return jnp.where(seen, energy, jnp.where(own > 0, own, jnp.where(others > 0, others, 1)))


def met(gram: jax.Array) -> jax.Array:
    """Gram matrices (layers, k, k), with the mean energy of the others for inputs of layers that saw nothing at all."""
    energy = jnp.diagonal(gram, axis1=-2, axis2=-1)
    whole = ~jnp.any(energy > 0, axis=-1, keepdims=True)
    return gram + jnp.eye(gram.shape[-1], dtype=gram.dtype) * jnp.where(whole, filled(energy), 0)[:, None, :]


def cholesky(hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lower triangular root of a positive semidefinite matrix, and what had to be added to its diagonal.

    Nothing, where the factorization holds: all pivots stand out from the rounding of float32, ``2 eps sqrt(k)`` of
    their diagonal entries at least. Else as little as makes it hold, in steps of ten, as a fraction of the mean
    diagonal. What has no root at all, NaN for one, is taken for the identity and infinity reported.

    Args:
      hessian: float32 (k, k).

    Returns:
      The root (k, k), finite, and the fraction (), 0 for a matrix that needs nothing.
    """
    least = _EPSILON * len(hessian) ** 0.5
    unit = scaling.of(jnp.max(jnp.diagonal(hessian), initial=0))
    scaled = unit.divide(hessian)
    diagonal = jnp.diagonal(scaled)
    mean = jnp.sum(diagonal / max(len(hessian), 1))

    def holds(root: jax.Array, raised: jax.Array) -> jax.Array:
        return jnp.all(jnp.diagonal(root) ** 2 > 2 * least * (diagonal + raised * mean))

    def raise_(state: tuple) -> tuple:
        tries = state[0]
        raised = jnp.where(tries > 0, 8 * least * 10.0 ** (tries - 1), 0).astype(jnp.float32)
        root = jnp.linalg.cholesky(scaled + jnp.diag(jnp.broadcast_to(raised * mean, diagonal.shape)))
        return tries + 1, root, raised, holds(root, raised)

    start = (jnp.int32(0), jnp.zeros_like(scaled), jnp.float32(0), jnp.bool_(False))
    _, root, raised, held = lax.while_loop(lambda state: ~state[3] & (state[0] < _TRIES), raise_, start)
    root = jnp.where(held, root, jnp.eye(len(hessian), dtype=hessian.dtype))
    return root * unit.root, jnp.where(held, raised, jnp.inf)


def inverse_factor(hessian: jax.Array) -> jax.Array:
    """The upper triangular ``U`` with ``U^T U = H^-1``, from one Cholesky factorization and one triangular inverse.

    With the order of rows and columns reversed, ``H = L L^T``; reversed back, ``L`` is upper triangular, and ``U`` is
    its inverse. Row ``j`` of ``U`` is what column ``j`` of the inverse becomes once the variables before ``j`` are
    held fixed, over the root of its diagonal. Where ``H`` is singular to float32, its diagonal is raised until it is
    not: :func:`cholesky`.
    """
    factor = cholesky(hessian[::-1, ::-1])[0][::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(hessian), dtype=hessian.dtype), lower=False)
