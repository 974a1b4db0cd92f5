"""Searches by points that move: particle swarms, and annealed masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jcompress import core
from jcompress.numeric import extremes
from jcompress.prune.search.evolution import Fitness, Found

_Four = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def particle_swarm(
    fitness: Fitness,
    key: jax.Array,
    length: int,
    *,
    particles: int = 32,
    steps: int = 200,
    inertia: float = 0.729,
    own: float = 1.494,
    best: float = 1.494,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Found:
    """Particle swarm optimization over real positions (Kennedy & Eberhart 1995).

    ``v <- inertia v + own u1 (p - x) + best u2 (g - x)`` and ``x <- x + v``, with p the best position of the particle,
    g that of the swarm, and uniform u. The constants are those of Clerc & Kennedy 2002, under which it converges. For
    masks search for ``fitness=lambda x: of_mask(x > 0)``.

    Args:
      fitness: of one position, float32 (length,), higher is better.
      key: a PRNG key.
      length: of a position.
      particles: in the swarm.
      steps: how many.
      inertia: how much of the velocity stays.
      own: how much a particle is drawn to its own best position.
      best: how much it is drawn to that of the swarm.
      bounds: the box where particles start. They may leave it.

    Returns:
      A :class:`Found`, of real positions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> found = search.particle_swarm(lambda x: -jnp.sum((x - 0.5) ** 2), jax.random.key(0), 2)
      >>> bool(jnp.allclose(found.best, 0.5, atol=1e-3))
      True
    """
    low, high = bounds

    def measure(positions: jax.Array) -> jax.Array:
        return extremes.lowest(jax.vmap(fitness)(positions))

    start, moving, key = jax.random.split(key, 3)
    positions = jax.random.uniform(start, (particles, length), jnp.float32, minval=low, maxval=high)
    velocities = jax.random.uniform(moving, (particles, length), jnp.float32, minval=-0.5, maxval=0.5) * (high - low)

    def step(state: _Four, key: jax.Array) -> tuple[_Four, jax.Array]:
        x, v, top, scores = state
        u = jax.random.uniform(key, (2, *x.shape), jnp.float32)
        v = inertia * v + own * u[0] * (top - x) + best * u[1] * (top[extremes.argmax(scores)] - x)
        x = x + v
        new = measure(x)
        better = new > scores
        top, scores = jnp.where(better[:, None], x, top), jnp.where(better, new, scores)
        return (x, v, top, scores), jnp.max(scores)

    state = positions, velocities, positions, measure(positions)
    (_, _, top, scores), history = jax.lax.scan(step, state, jax.random.split(key, steps))
    place = jnp.argmax(scores)
    return Found(top[place], scores[place], history)


def anneal(
    fitness: Fitness,
    key: jax.Array,
    start: jax.Array,
    temperature: optax.ScalarOrSchedule,
    *,
    steps: int = 1000,
    chains: int = 8,
    swap: bool = True,
) -> Found:
    """Simulated annealing of masks (Kirkpatrick et al. 1983).

    A step proposes another mask and takes it with the probability ``min(1, exp((new - old) / temperature))``.

    Args:
      fitness: of one mask, higher is better.
      key: a PRNG key.
      start: the first mask of all chains, boolean (length,).
      temperature: a number, or an optax schedule, such as ``optax.exponential_decay(1.0, 100, 0.5)``.
      steps: how many.
      chains: that run side by side.
      swap: exchange a one and a zero, so that the number kept stays; False flips one bit. A mask that is all ones or
        zeros has nothing to exchange and stays.

    Returns:
      A :class:`Found`, over all chains.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jcompress.prune import search
      >>> values = jnp.array([1.0, 5.0, 3.0, 2.0, 4.0])
      >>> start = jnp.array([True, False, False, True, False])
      >>> cooling = optax.exponential_decay(2.0, 20, 0.5)
      >>> found = search.anneal(lambda mask: mask @ values, jax.random.key(0), start, cooling, steps=200)
      >>> found.best.tolist()
      [False, True, False, False, True]
    """

    def propose(key: jax.Array, mask: jax.Array) -> jax.Array:
        if not swap:
            return mask ^ (jnp.arange(mask.size) == jax.random.randint(key, (), 0, mask.size))
        draws = jax.random.uniform(key, mask.shape, jnp.float32)
        out, into = jnp.argmax(jnp.where(mask, draws, -1)), jnp.argmax(jnp.where(mask, -1, draws))
        # Where one of the two kinds is missing, both indices agree or the mask would change its count.
        possible = mask[out] & ~mask[into]
        return jnp.where(possible, mask.at[out].set(False).at[into].set(True), mask)

    def step(state: _Four, now: tuple[jax.Array, jax.Array]) -> tuple[_Four, jax.Array]:
        mask, score, best, top = state
        key, t = now
        first, second = jax.random.split(key)
        other = propose(first, mask)
        new = extremes.lowest(fitness(other))
        taken = jnp.log(jax.random.uniform(second, dtype=jnp.float32)) * t < new - score
        mask, score = jnp.where(taken, other, mask), jnp.where(taken, new, score)
        best, top = jnp.where(score > top, mask, best), jnp.maximum(score, top)
        return (mask, score, best, top), top

    def chain(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        score = extremes.lowest(fitness(start))
        temperatures = jnp.broadcast_to(core.value_at(temperature, jnp.arange(steps)), steps)
        state, history = jax.lax.scan(step, (start, score, start, score), (jax.random.split(key, steps), temperatures))
        return state[2], state[3], history

    masks, scores, history = jax.vmap(chain)(jax.random.split(key, chains))
    place = jnp.argmax(scores)
    return Found(masks[place], scores[place], jnp.max(history, 0))
