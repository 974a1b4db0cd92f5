"""Search for masks by populations: each search is one ``scan`` over a fitness that is mapped over the population.

A fitness is a function of one mask, boolean (length,), that gives a number, higher is better. It must be traceable, and
may call back to the host (``jax.pure_callback`` with ``vmap_method="sequential"``). A bit may stand for a weight, a
channel, a head or a layer: the fitness says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core
from jcompress.prune import pareto

Fitness = Callable[[jax.Array], jax.Array]
_Four = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Found(NamedTuple):
    """What a search found.

    Attributes:
      best: the best mask or position seen, (length,).
      fitness: its fitness.
      history: the best fitness seen up to each step, (steps,).
    """

    best: jax.Array
    fitness: jax.Array
    history: jax.Array


class Front(NamedTuple):
    """The last population of a search with several objectives.

    Attributes:
      masks: (population, length), boolean.
      scores: (population, objectives).
      rank: (population,): 0 for masks that no other of them beats.
    """

    masks: jax.Array
    scores: jax.Array
    rank: jax.Array


def genetic(
    fitness: Fitness,
    key: jax.Array,
    length: int,
    *,
    population: int = 64,
    generations: int = 100,
    selection: Literal["tournament", "roulette"] = "tournament",
    crossover: float = 0.9,
    mutation: float | None = None,
    elites: int = 2,
    density: float = 0.5,
) -> Found:
    """A genetic algorithm on masks (Holland 1975).

    Parents are chosen by tournaments of two, or by roulette with ``p = softmax(fitness)``; a pair mixes bit by bit;
    bits flip; the best of the old generation replace as many children, so that the best fitness never falls.

    Args:
      fitness: of one mask, higher is better.
      key: a PRNG key.
      length: bits of a mask.
      population: masks in a generation.
      generations: how many.
      selection: how parents are chosen.
      crossover: the probability that a child mixes two parents; else it is a copy of one.
      mutation: the probability of a bit to flip, ``1 / length`` by default.
      elites: masks that go on unchanged.
      density: the expected fraction of ones at the start.

    Raises:
      ValueError: for an unknown selection, or more elites than the population has members.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> goal = jnp.array([True, False, True, True, False, True])
      >>> found = search.genetic(lambda mask: (mask == goal).mean(), jax.random.key(0), 6, generations=20)
      >>> found.best.tolist()
      [True, False, True, True, False, True]
    """
    if selection not in ("tournament", "roulette"):
        raise ValueError(f"genetic: selection={selection!r} is unknown; use 'tournament' or 'roulette'")
    if not 0 <= elites <= population:
        raise ValueError(f"genetic: elites={elites} must be in 0 .. population={population}")
    measure, rate = jax.vmap(fitness), 1 / length if mutation is None else mutation

    def pick(key: jax.Array, scores: jax.Array) -> jax.Array:
        if selection == "roulette":
            return jax.random.categorical(key, scores, shape=(population,))
        pairs = jax.random.randint(key, (2, population), 0, population)
        return jnp.where(scores[pairs[0]] >= scores[pairs[1]], pairs[0], pairs[1])

    def step(state: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        masks, scores = state
        first, second, third = jax.random.split(key, 3)
        children = _children(third, masks[pick(first, scores)], masks[pick(second, scores)], crossover, rate)
        children = children.at[:elites].set(masks[jnp.argsort(scores, descending=True)[:elites]])
        scores = measure(children)
        return (children, scores), jnp.max(scores)

    start, key = jax.random.split(key)
    masks = jax.random.bernoulli(start, density, (population, length))
    (masks, scores), best = jax.lax.scan(step, (masks, measure(masks)), jax.random.split(key, generations))
    place = jnp.argmax(scores)
    return Found(masks[place], scores[place], best)


def _children(key: jax.Array, a: jax.Array, b: jax.Array, crossover: Any, mutation: Any) -> jax.Array:
    mixed, chosen, flipped = jax.random.split(key, 3)
    mixes = jax.random.bernoulli(mixed, crossover, (a.shape[0], 1))
    children = jnp.where(mixes & jax.random.bernoulli(chosen, 0.5, a.shape), b, a)
    return children ^ jax.random.bernoulli(flipped, mutation, a.shape)


def genetic_front(
    objectives: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    length: int,
    *,
    population: int = 64,
    generations: int = 100,
    crossover: float = 0.9,
    mutation: float | None = None,
    density: float = 0.5,
) -> Front:
    """A genetic algorithm with several objectives, NSGA-II (Deb et al. 2002): accuracy, bytes, robustness.

    Of parents and children together those of lower rank stay, and of equal ones those with more room around them. A
    tournament decides by the same order.

    Args:
      objectives: of one mask, (objectives,), each higher is better: negate bytes.
      key: a PRNG key.
      length: bits of a mask.
      population: masks in a generation.
      generations: how many.
      crossover: as for :func:`genetic`.
      mutation: as for :func:`genetic`.
      density: as for :func:`genetic`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> front = search.genetic_front(lambda m: jnp.stack([m.mean(), -m.mean()]), jax.random.key(0), 4, generations=5)
      >>> int(front.rank.max())
      0
    """
    measure, rate = jax.vmap(objectives), 1 / length if mutation is None else mutation

    def ordered(masks: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        rank = pareto.ranks(scores)
        best = jnp.lexsort((-pareto.crowding(scores, rank), rank))[:population]
        return masks[best], scores[best]

    def step(state: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        masks, scores = state
        chosen, made = jax.random.split(key)
        # The population stands in order, so the winner of a tournament is the lower index.
        parents = jax.random.randint(chosen, (2, 2, population), 0, population).min(0)
        children = _children(made, masks[parents[0]], masks[parents[1]], crossover, rate)
        return ordered(jnp.concatenate([masks, children]), jnp.concatenate([scores, measure(children)])), None

    start, key = jax.random.split(key)
    masks = jax.random.bernoulli(start, density, (population, length))
    first = ordered(masks, measure(masks))
    (masks, scores), _ = jax.lax.scan(step, first, jax.random.split(key, generations))
    return Front(masks, scores, pareto.ranks(scores))


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

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> found = search.particle_swarm(lambda x: -jnp.sum((x - 0.5) ** 2), jax.random.key(0), 2)
      >>> bool(jnp.allclose(found.best, 0.5, atol=1e-3))
      True
    """
    measure, (low, high) = jax.vmap(fitness), bounds
    start, moving, key = jax.random.split(key, 3)
    positions = jax.random.uniform(start, (particles, length), minval=low, maxval=high)
    velocities = jax.random.uniform(moving, (particles, length), minval=-0.5, maxval=0.5) * (high - low)

    def step(state: _Four, key: jax.Array) -> tuple[_Four, jax.Array]:
        x, v, top, scores = state
        u = jax.random.uniform(key, (2, *x.shape))
        v = inertia * v + own * u[0] * (top - x) + best * u[1] * (top[jnp.argmax(scores)] - x)
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
        draws = jax.random.uniform(key, mask.shape)
        out, into = jnp.argmax(jnp.where(mask, draws, -1)), jnp.argmax(jnp.where(mask, -1, draws))
        # Where one of the two kinds is missing, both indices agree or the mask would change its count.
        possible = mask[out] & ~mask[into]
        return jnp.where(possible, mask.at[out].set(False).at[into].set(True), mask)

    def step(state: _Four, now: tuple[jax.Array, jax.Array]) -> tuple[_Four, jax.Array]:
        mask, score, best, top = state
        key, t = now
        first, second = jax.random.split(key)
        other = propose(first, mask)
        new = fitness(other)
        taken = jnp.log(jax.random.uniform(second)) * t < new - score
        mask, score = jnp.where(taken, other, mask), jnp.where(taken, new, score)
        best, top = jnp.where(score > top, mask, best), jnp.maximum(score, top)
        return (mask, score, best, top), top

    def chain(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        score = fitness(start)
        temperatures = jnp.broadcast_to(core.value_at(temperature, jnp.arange(steps)), steps)
        state, history = jax.lax.scan(step, (start, score, start, score), (jax.random.split(key, steps), temperatures))
        return state[2], state[3], history

    masks, scores, history = jax.vmap(chain)(jax.random.split(key, chains))
    place = jnp.argmax(scores)
    return Found(masks[place], scores[place], jnp.max(history, 0))


class Filtered(NamedTuple):
    """What a particle filter leaves: particles, their weights, and the effective number of particles at each step."""

    masks: jax.Array
    weights: jax.Array
    effective: jax.Array


def particle_filter(
    error: Fitness,
    key: jax.Array,
    length: int,
    *,
    particles: int = 128,
    steps: int = 50,
    flip: float | None = None,
    density: float = 0.5,
) -> Filtered:
    """A particle filter over masks: weights ``exp(-error)``, resampling, and bits that flip (Anwar et al. 2017).

    The paper is arXiv:1512.08571. A step flips bits, multiplies each weight by ``exp(-error)`` and normalises. If the
    effective number of particles, ``1 / sum weights**2``, falls below half, particles are drawn anew in proportion to
    their weights (systematic resampling) and weigh the same again.

    Args:
      error: of one mask, lower is better: a loss, or the errors on a validation split. Divide it by a temperature to
        make the filter more or less greedy.
      key: a PRNG key.
      length: bits of a mask.
      particles: how many.
      steps: how many.
      flip: the probability of a bit to flip in a step, ``1 / length`` by default.
      density: the expected fraction of ones at the start.

    Returns:
      :class:`Filtered`: masks (particles, length), weights (particles,) that sum to one, and the effective number of
      particles before any resampling, (steps,).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> found = search.particle_filter(lambda mask: 4.0 * mask.sum(), jax.random.key(0), 6)
      >>> bool(found.masks.T @ found.weights @ jnp.ones(6) < 1)
      True
    """
    rate = 1 / length if flip is None else flip
    errors = jax.vmap(error)

    def step(state: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        masks, logs = state
        flipped, drawn = jax.random.split(key)
        masks = masks ^ jax.random.bernoulli(flipped, rate, masks.shape)
        logs = jax.nn.log_softmax(logs - errors(masks))
        effective = jnp.exp(-jax.nn.logsumexp(2 * logs))
        poor = effective < particles / 2
        places = jnp.where(poor, systematic(drawn, jnp.exp(logs)), jnp.arange(particles))
        return (masks[places], jnp.where(poor, jnp.zeros_like(logs), logs)), effective

    first, key = jax.random.split(key)
    masks = jax.random.bernoulli(first, density, (particles, length))
    (masks, logs), effective = jax.lax.scan(step, (masks, jnp.zeros(particles)), jax.random.split(key, steps))
    return Filtered(masks, jax.nn.softmax(logs), effective)


def systematic(key: jax.Array, weights: jax.Array) -> jax.Array:
    """Indices drawn in proportion to weights, each ``n * weight`` times up to rounding: systematic resampling.

    Args:
      key: for the one offset that is drawn.
      weights: (n,), not negative; they need not sum to one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> search.systematic(jax.random.key(0), jnp.array([0.0, 0.5, 0.5, 0.0])).tolist()
      [1, 1, 2, 2]
    """
    n = weights.shape[0]
    sums = jnp.cumsum(weights)
    points = (jnp.arange(n) + jax.random.uniform(key)) / n * sums[-1]
    return jnp.minimum(jnp.searchsorted(sums, points, side="right"), n - 1)
