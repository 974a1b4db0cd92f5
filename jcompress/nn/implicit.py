"""Networks of endless depth: the state that a layer leaves as it is, and its derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

PyTree = Any
_RIDGE = 1e-8


def equilibrium(
    fn: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    start: PyTree,
    *,
    iterations: int = 50,
    tolerance: float = 1e-5,
    memory: int = 5,
) -> PyTree:
    """The fixed point ``z = fn(params, x, z)``, differentiated implicitly (deep equilibrium; Bai et al. 2019).

    One layer's parameters serve a network of any depth. The fixed point is found by Anderson acceleration: of the last
    ``memory`` states, the combination whose changes cancel best (Walker & Ni 2011). Backward, ``u = g + u J`` is solved
    the same way, J the layer's derivative at the fixed point, and ``u`` is pulled back through one layer: nothing of
    the search is kept, so memory does not depend on the iterations. Reverse mode only. The layer should be a
    contraction near its fixed point, as with small weights or a norm behind it.

    Args:
      fn: the layer, a function of parameters, input and state that gives a new state; it closes over no traced arrays.
      params: a pytree.
      x: a pytree, the input.
      start: a pytree of float arrays, the first state; no gradient passes into it.
      iterations: the most evaluations of the layer, and the same backward.
      tolerance: the norm of ``fn(params, x, z) - z`` over that of the state at which to stop.
      memory: states that are combined; 1 for plain iteration.

    Returns:
      The state, like ``start``.

    Raises:
      ValueError: for iterations or a memory that are not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> layer = lambda w, x, z: jnp.tanh(w * z + x)
      >>> z = jc.nn.equilibrium(layer, 0.5, jnp.array([1.0, -2.0]), jnp.zeros(2))
      >>> bool(jnp.allclose(layer(0.5, jnp.array([1.0, -2.0]), z), z, atol=1e-5))
      True

    Reference: arXiv:1909.01377.
    """
    if iterations < 1 or memory < 1:
        raise ValueError(f"equilibrium: iterations={iterations}, memory={memory}; expected positive ones")
    return _solve(fn, iterations, tolerance, memory, params, x, lax.stop_gradient(start))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _solve(
    layer: Callable[..., PyTree], iterations: int, tolerance: float, memory: int, params: PyTree, x: PyTree, z: PyTree
) -> PyTree:
    return anderson(lambda z: layer(params, x, z), z, iterations, tolerance, memory)


def _forward(
    layer: Callable[..., PyTree], iterations: int, tolerance: float, memory: int, params: PyTree, x: PyTree, z: PyTree
) -> tuple[PyTree, tuple]:
    z = _solve(layer, iterations, tolerance, memory, params, x, z)
    return z, (params, x, z)


def _backward(
    layer: Callable[..., PyTree], iterations: int, tolerance: float, memory: int, saved: tuple, g: PyTree
) -> tuple:
    params, x, z = saved
    _, pull = jax.vjp(layer, params, x, z)
    step = lambda u: jax.tree.map(jnp.add, g, pull(u)[2])  # noqa: E731
    u = anderson(step, g, iterations, tolerance, memory)
    of_params, of_x, _ = pull(u)
    return of_params, of_x, jax.tree.map(jnp.zeros_like, z)


_solve.defvjp(_forward, _backward)


def anderson(step: Callable[[PyTree], PyTree], start: PyTree, iterations: int, tolerance: float, memory: int) -> PyTree:
    """The state that a step leaves as it is, by Anderson acceleration.

    Args:
      step: of a pytree of float arrays.
      start: where to begin.
      iterations: the most steps.
      tolerance: the relative change at which to stop.
      memory: states that are combined.
    """
    z, back = ravel_pytree(start)
    flat = lambda z: ravel_pytree(step(back(z)))[0].astype(z.dtype)  # noqa: E731
    n = max(memory, 1)

    def goes_on(state: tuple) -> jax.Array:
        return (state[0] < iterations) & (state[3] > tolerance)

    def one(state: tuple) -> tuple:
        i, states, values, _, z = state
        value = flat(z)
        change = jnp.linalg.norm(value - z) / jnp.maximum(jnp.linalg.norm(value), 1e-12)
        states, values = states.at[i % n].set(z), values.at[i % n].set(value)
        return i + 1, states, values, change, _mixed(states, values, jnp.minimum(i + 1, n))

    empty = jnp.zeros((n, z.size), z.dtype)
    found = lax.while_loop(goes_on, one, (jnp.int32(0), empty, empty, jnp.asarray(jnp.inf, z.dtype), z))
    return back(found[4])


def _mixed(states: jax.Array, values: jax.Array, count: jax.Array) -> jax.Array:
    """The sum of values, its shares adding up to one, whose changes cancel best in least squares."""
    known = jnp.arange(len(states)) < count
    changes = jnp.where(known[:, None], values - states, 0)
    products = jnp.matmul(changes, changes.T, precision=lax.Precision.HIGHEST)
    scale = jnp.maximum(jnp.trace(products), jnp.finfo(products.dtype).tiny)
    products = products / scale + jnp.diag(jnp.where(known, _RIDGE, 1.0))
    shares = jnp.where(known, jnp.linalg.solve(products, known.astype(products.dtype)), 0)
    return jnp.matmul(shares / jnp.sum(shares), values, precision=lax.Precision.HIGHEST)
