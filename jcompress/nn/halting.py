"""As many steps of one cell as an example needs (adaptive computation time)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jcompress.nn.kernels import one_by_one

State = Any


def adaptive_steps(
    step: Callable[[State], State],
    halt: Callable[[State], jax.Array],
    state: State,
    steps: int,
    epsilon: float = 0.01,
    each: bool = False,
) -> tuple[State, jax.Array, jax.Array]:
    """Repeat a step until each example's halting probabilities sum to 1 (ACT; Graves 2016, arXiv:1603.08983).

    After step ``n`` the state has ``h_n = halt(state)``. An example stops at the first ``N`` with ``sum h >= 1 -
    epsilon``, or at the last step. Its states are averaged with weights ``p_n = h_n`` before ``N`` and the remainder
    ``R = 1 - sum_{n < N} h_n`` there, which sum to 1; ``N + R`` is its ponder cost, to be added to the loss.

    Args:
      step: from a state to the next, on batches.
      halt: from a state to probabilities (batch,).
      state: a pytree of arrays (batch, ...) of floats.
      steps: at most.
      epsilon: so that one step may be enough.
      each: whether examples run one by one and stop (``while_loop``, no gradient); by default all take all steps, and
        those that stopped no longer count.

    Returns:
      ``(mean state, ponder (batch,), weights (batch, steps))``.

    Raises:
      ValueError: for fewer than one step.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> mean, ponder, weights = jc.nn.adaptive_steps(
      ...     lambda s: s + 1, lambda s: jnp.full(len(s), 0.75), jnp.zeros((1, 1)), steps=5)
      >>> mean.tolist(), ponder.tolist(), weights[0].tolist()
      ([[1.25]], [2.25], [0.75, 0.25, 0.0, 0.0, 0.0])
    """
    if steps < 1:
        raise ValueError(f"adaptive_steps: found {steps} steps, expected one at least")
    turn = _turn(step, halt, steps, epsilon)
    if each:

        def one(state: State) -> tuple[State, jax.Array, jax.Array]:
            begin = _begin(state, steps)
            found = jax.lax.while_loop(lambda c: (c[0] < steps) & ~c[2][0], lambda c: turn(c), begin)
            return found[3], found[4], found[5]

        return one_by_one(one, state)
    found, _ = jax.lax.scan(lambda carry, _: (turn(carry), None), _begin(state, steps), length=steps)
    return found[3], found[4], found[5]


def _begin(state: State, steps: int) -> Any:
    """Step, (state, halting so far), stopped, mean, ponder, weights."""
    batch = jax.tree.leaves(state)[0].shape[0]
    zeros = jnp.zeros(batch, jnp.float32)
    mean = jax.tree.map(jnp.zeros_like, state)
    return 0, (state, zeros), jnp.zeros(batch, bool), mean, zeros, jnp.zeros((batch, steps), jnp.float32)


def _turn(step: Any, halt: Any, steps: int, epsilon: float) -> Callable[[Any], Any]:
    def turn(carry: Any) -> Any:
        n, (state, total), stopped, mean, ponder, weights = carry
        state = step(state)
        h = halt(state).astype(jnp.float32)
        last = (total + h >= 1 - epsilon) | (n == steps - 1)
        p = jnp.where(stopped, 0, jnp.where(last, 1 - total, h))
        mean = jax.tree.map(lambda m, s: m + p.reshape(-1, *(1 for _ in s.shape[1:])).astype(s.dtype) * s, mean, state)
        ponder = ponder + jnp.where(stopped, 0, 1 + jnp.where(last, 1 - total, 0))
        total = total + jnp.where(stopped, 0, h)
        return n + 1, (state, total), stopped | last, mean, ponder, weights.at[:, n].set(p)

    return turn


class AdaptiveSteps(nnx.Module):
    """A cell repeated as often as an example needs: :func:`adaptive_steps` (Graves 2016, arXiv:1603.08983).

    Args:
      cell: a module or function from states (batch, in_features) to states.
      in_features: of the state.
      steps: at most.
      epsilon: so that one step may be enough.
      param_dtype: of the halting unit, whose bias begins at 1: few steps.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for fewer than one step.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jc.nn.AdaptiveSteps(nnx.Linear(4, 4, rngs=rngs), 4, steps=3, rngs=rngs)
      >>> state, ponder, weights = layer(jnp.ones((2, 4)))
      >>> state.shape, weights.shape
      ((2, 4), (2, 3))
    """

    def __init__(
        self,
        cell: Callable[[Any], Any],
        in_features: int,
        *,
        steps: int,
        epsilon: float = 0.01,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if steps < 1:
            raise ValueError(f"AdaptiveSteps: found {steps} steps, expected one at least")
        ones = nnx.initializers.ones_init()
        self.cell, self.steps, self.epsilon = cell, steps, epsilon
        self.halt = nnx.Linear(in_features, 1, bias_init=ones, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, each: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``(mean state, ponder, weights)``; with ``each`` examples run one by one and stop."""

        def halt(state: jax.Array) -> jax.Array:
            return jax.nn.sigmoid(self.halt(state)[..., 0])

        return adaptive_steps(self.cell, halt, x, self.steps, self.epsilon, each)
