"""Trellis codes: numbers as a walk over states, each a function of the last bits, and the walk nearest to others."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Code = Literal["1mad", "3inst"]
_BATCH = 16
"""Sequences that are searched side by side."""


def value(state: jax.Array, code: Code) -> jax.Array:
    """What a state stands for: about Gaussian, mean 0, variance 1; a few instructions in place of a table.

    ``"1mad"`` is the sum of the bytes of a congruential generator, ``"3inst"`` the sum of two float16 made of its bits.

    Args:
      state: integers of up to 16 bits.
      code: which one.
    """
    x = state.astype(jnp.uint32)
    if code == "1mad":
        x = x * jnp.uint32(34038481) + jnp.uint32(76625530)
        total = sum(((x >> (8 * i)) & 255).astype(jnp.int32) for i in range(4))
        return (total - 510).astype(jnp.float32) * (1 / 147.8)
    x = x * jnp.uint32(89226354) + jnp.uint32(64248484)
    x = (x & jnp.uint32(0x8FFF8FFF)) ^ jnp.uint32(0x3B603B60)
    halves = [lax.bitcast_convert_type((x >> s).astype(jnp.uint16), jnp.float16).astype(jnp.float32) for s in (0, 16)]
    return (halves[0] + halves[1]) * (1 / 1.24)


def decode(codes: jax.Array, bits: int, memory: int, code: Code) -> jax.Array:
    """The numbers of sequences of symbols: each that of the last ``memory`` bits, the beginning following the end.

    Args:
      codes: integers (..., length), ``bits`` each.
      bits: of a symbol.
      memory: bits of a state.
      code: of :func:`value`.

    Returns:
      float32 (..., length).
    """
    symbols, state = codes.astype(jnp.int32), jnp.zeros(codes.shape, jnp.int32)
    for i in range(-(-memory // bits)):
        state = state | (jnp.roll(symbols, i, axis=-1) << (bits * i))
    return value(state & ((1 << memory) - 1), code)


@partial(jax.jit, static_argnames=("bits", "memory", "code"))
def encode(x: jax.Array, bits: int, memory: int, code: Code) -> jax.Array:
    """Symbols whose numbers are near to sequences: Viterbi's algorithm, twice.

    The bits at the seam must agree: a free walk over the sequence, begun in its middle, says which they are, and the
    nearest walk with these is taken (tail-biting, as in Tseng et al. 2024).

    Args:
      x: float32 (..., length).
      bits: of a symbol.
      memory: bits of a state.
      code: of :func:`value`.

    Returns:
      uint8 (..., length).
    """
    levels, half = value(jnp.arange(1 << memory), code), x.shape[-1] // 2
    free = jnp.zeros(1 << (memory - bits), jnp.float32)

    def one(x: jax.Array) -> jax.Array:
        seam = walk(jnp.roll(x, -half), levels, bits, free)[x.shape[0] - half] >> bits
        held = jnp.where(jnp.arange(len(free)) == seam, 0.0, jnp.inf)
        return (walk(x, levels, bits, held) & ((1 << bits) - 1)).astype(jnp.uint8)

    rows = x.reshape(-1, x.shape[-1])
    if not rows.size:
        return jnp.zeros(x.shape, jnp.uint8)
    return lax.map(one, rows, batch_size=min(_BATCH, len(rows))).reshape(x.shape)


def walk(x: jax.Array, levels: jax.Array, bits: int, seam: jax.Array) -> jax.Array:
    """The states of the nearest walk, by dynamic programming over all of them.

    Args:
      x: float32 (length,).
      levels: (2**memory,), what the states stand for.
      bits: of a symbol: a state is followed by those that its last bits begin.
      seam: (2**(memory - bits),), what it costs if the bits that end the walk, and those before its start, are these.

    Returns:
      int32 (length,).
    """
    fans, rest = 1 << bits, levels.size >> bits
    after = levels.reshape(rest, fans)

    def step(cost: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        before = cost.reshape(fans, rest)
        least, chosen = before[0], jnp.zeros(rest, jnp.uint8)
        for i in range(1, fans):
            chosen = jnp.where(before[i] < least, jnp.uint8(i), chosen)
            least = jnp.minimum(before[i], least)
        return (least[:, None] + jnp.square(y - after)).reshape(-1), chosen

    first = (seam[:, None] + jnp.square(x[0] - after)).reshape(-1)
    cost, chosen = lax.scan(step, first, x[1:])
    last = jnp.argmin(cost + jnp.tile(seam, fans)).astype(jnp.int32)

    def back(state: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        low = state >> bits
        return (chosen[low].astype(jnp.int32) << (rest.bit_length() - 1)) | low, state

    start, states = lax.scan(back, last, chosen, reverse=True)
    return jnp.concatenate([start[None], states])
