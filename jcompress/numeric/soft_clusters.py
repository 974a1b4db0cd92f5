"""Soft k-means as a differentiable layer: its fixed point, and three ways to differentiate it."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Gradient = Literal["unrolled", "implicit", "jacobian_free", "trained"]
HIGHEST = lax.Precision.HIGHEST
_RESTART, _RESTARTS = 20, 5


def assignments(x: jax.Array, words: jax.Array, temperature: Any) -> jax.Array:
    """``softmax_j(-||x_i - c_j|| / temperature)``.

    Args:
      x: float32 (n, d).
      words: float32 (clusters, d).
      temperature: in the unit of the distances, positive.

    Returns:
      float32 (n, clusters).
    """
    square = jnp.sum(jnp.square(x[:, None] - words), axis=-1)
    # The root has no derivative at zero, where a word is a row.
    distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return jax.nn.softmax(-distance / temperature, axis=-1)


def moved(x: jax.Array, words: jax.Array, temperature: Any) -> jax.Array:
    """One round: the means of all rows, weighted by their assignments to each word."""
    soft = assignments(x, words, temperature)
    total, count = jnp.matmul(soft.T, x, precision=HIGHEST), jnp.sum(soft, axis=0)[:, None]
    return jnp.where(count > 1e-12, total / jnp.maximum(count, 1e-12), words)


def fixed_words(x: jax.Array, start: jax.Array, temperature: Any, iterations: int, gradient: Gradient) -> jax.Array:
    """The words that a round leaves where they are, or those after ``iterations`` rounds.

    Args:
      x: float32 (n, d).
      start: float32 (clusters, d).
      temperature: positive; no gradient passes through it.
      iterations: rounds.
      gradient: ``"unrolled"`` differentiates every round, and holds what each needs (DKM); ``"implicit"`` solves
        ``u = g + J^T u`` at the last words, J the derivative of a round in the words, and ``"jacobian_free"`` takes g
        for u: neither holds more with more rounds (IDKM). ``"trained"`` takes the start for the words.

    Returns:
      float32 (clusters, d). But for ``"trained"``, no gradient passes into the start.
    """
    if gradient == "trained":
        return start
    temperature, start = lax.stop_gradient((temperature, start))
    if gradient == "unrolled":
        step = lambda words, _: (moved(x, words, temperature), None)  # noqa: E731
        return lax.scan(step, start, None, length=iterations)[0]
    return _solved(x, start, temperature, iterations, gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _solved(x: jax.Array, start: jax.Array, temperature: jax.Array, iterations: int, gradient: Gradient) -> jax.Array:
    return lax.fori_loop(0, iterations, lambda _, words: moved(x, words, temperature), start)


def _forward(x: jax.Array, start: jax.Array, temperature: jax.Array, iterations: int, gradient: Gradient) -> tuple:
    words = _solved(x, start, temperature, iterations, gradient)
    return words, (x, words, temperature)


def _backward(iterations: int, gradient: Gradient, saved: tuple, g: jax.Array) -> tuple:
    x, words, temperature = saved
    _, pull = jax.vjp(lambda x, words: moved(x, words, temperature), x, words)
    u = g
    if gradient == "implicit":
        solver = functools.partial(jax.scipy.sparse.linalg.gmres, restart=min(_RESTART, g.size), maxiter=_RESTARTS)
        u, _ = solver(lambda u: u - pull(u)[1], g, tol=1e-6)
    return pull(u)[0], jnp.zeros_like(words), jnp.zeros_like(temperature)


_solved.defvjp(_forward, _backward)
