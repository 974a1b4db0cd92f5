"""Trellises of two scalar quantizers: which of them a number gets follows from the parities of the codes before.

The bit of the quantizer obeys a linear recursion over the parities ``p`` of codes, ``b[t] = b[t-2] ^ p[t-1]`` with 4
states, the machine of VVC and of ISO/IEC 15938-17, and ``b[t] = b[t-2] ^ b[t-3] ^ p[t-1]`` with 8, a code of Ungerboeck
(1982). Every sequence, a row along the last axis, starts with bits of 0. Reading needs no loop: since over bits ``(1 +
D^2 + D^3) (1 + D^2 + D^3 + D^4)`` is ``1 + D^7``, they are sums of every second, or of every seventh, parity.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STATES = (4, 8)
_DELAYS = {4: (2, (1,)), 8: (7, (1, 3, 4, 5))}
"""For each number of states: the period of the sums, and how far back the parities are that go into them."""


def quantizers(codes: Any, states: int) -> Any:
    """Which quantizer each code is of, int32 of 0 and 1 in the shape of ``codes``; on the host for NumPy arrays."""
    lib: Any = np if isinstance(codes, np.ndarray) else jnp
    (period, delays), length = _DELAYS[states], codes.shape[-1]
    first, whole = max(delays), length + -length % period
    odd = codes.astype(np.int32) & 1
    odd = lib.pad(odd, [(0, 0)] * (odd.ndim - 1) + [(first, whole - length)])
    fed = sum(odd[..., first - d : first - d + whole] for d in delays)
    found = lib.cumsum(fed.reshape(*codes.shape[:-1], whole // period, period), axis=-2, dtype=np.int32) & 1
    return found.reshape(*codes.shape[:-1], whole)[..., :length]


def step(state: np.ndarray, odd: np.ndarray, states: int) -> np.ndarray:
    """The state after a code of this parity. The lowest bit of a state is that of the quantizer, then those before."""
    feedback = state >> 1 ^ (state >> 2 if states == 8 else 0)
    return state << 1 & (states - 1) | (feedback ^ odd) & 1


def _predecessors(states: int) -> tuple[np.ndarray, np.ndarray]:
    """The two states that lead to each, and the parities that do, both (2, states)."""
    state, odd = np.meshgrid(np.arange(states), np.arange(2), indexing="ij")
    after = step(state, odd, states).ravel()
    order = np.argsort(after, kind="stable").reshape(states, 2).T
    return order // 2, order % 2


def cheapest(costs: jax.Array, states: int) -> tuple[jax.Array, jax.Array]:
    """The path of least cost through the trellis, by Viterbi's algorithm.

    Args:
      costs: float32 (length, 2, 2, rows): of each number in each quantizer with a code of each parity.
      states: 4 or 8.

    Returns:
      The quantizer and the parity of each number, int32 (length, rows).
    """
    before, odd = _predecessors(states)
    quantizer = before & 1

    def forward(total: jax.Array, cost: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = (total[before[i]] + cost[quantizer[i], odd[i]] for i in range(2))
        least = jnp.minimum(first, second)
        return least - jnp.min(least, axis=0), second < first  # sums stay small, so that float32 does not lose them

    start = jnp.full((states, costs.shape[-1]), jnp.inf, jnp.float32).at[0].set(0)
    last, taken = jax.lax.scan(forward, start, costs)

    def back(state: jax.Array, taken: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        which = jnp.take_along_axis(taken, state[None], axis=0)[0].astype(jnp.int32)
        came = jnp.asarray(before, jnp.int32)[which, state]
        return came, (came & 1, jnp.asarray(odd, jnp.int32)[which, state])

    end = jnp.argmin(last, axis=0).astype(jnp.int32)
    return jax.lax.scan(back, end, taken, reverse=True)[1]
