"""Genetic algorithms on masks, with one objective and with several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jcompress.numeric import dominance, extremes

Fitness = Callable[[jax.Array], jax.Array]
"""A fitness: a boolean mask (length,) -> a number, higher is better."""


class Found(NamedTuple):
    """What a search found.

    Attributes:
      best: the best mask or position seen, (length,).
      fitness: its fitness.
      history: the best fitness seen up to each step, (steps,).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> found = search.genetic(lambda mask: mask.mean(), jax.random.key(0), 4, generations=10)
      >>> found.best.tolist(), float(found.fitness), found.history.shape
      ([True, True, True, True], 1.0, (10,))
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

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> front = search.genetic_front(lambda m: jnp.stack([m.mean(), -m.mean()]), jax.random.key(0), 4, generations=2)
      >>> front.masks.shape, front.scores.shape
      ((64, 4), (64, 2))
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
    bits flip; the best of the old generation replace as many children, so that the best of a generation never falls.
    The best mask ever met is returned, also without elites. A fitness of NaN counts as the lowest.

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

    Returns:
      A :class:`Found`.

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
    rate = 1 / length if mutation is None else mutation

    def measure(masks: jax.Array) -> jax.Array:
        return extremes.lowest(jax.vmap(fitness)(masks))

    def pick(key: jax.Array, scores: jax.Array) -> jax.Array:
        if selection == "roulette":
            return jax.random.categorical(key, scores, shape=(population,))
        pairs = jax.random.randint(key, (2, population), 0, population)
        return jnp.where(scores[pairs[0]] >= scores[pairs[1]], pairs[0], pairs[1])

    def better(best: tuple, masks: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = jnp.argmax(scores)
        return jnp.where(scores[place] > best[1], masks[place], best[0]), jnp.maximum(scores[place], best[1])

    def step(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        masks, scores, best = state
        first, second, third = jax.random.split(key, 3)
        children = _children(third, masks[pick(first, scores)], masks[pick(second, scores)], crossover, rate)
        children = children.at[:elites].set(masks[jnp.argsort(scores, descending=True)[:elites]])
        scores = measure(children)
        best = better(best, children, scores)
        return (children, scores, best), best[1]

    start, key = jax.random.split(key)
    masks = jax.random.bernoulli(start, jnp.float32(density), (population, length))
    scores = measure(masks)
    start_state = masks, scores, better((masks[0], scores[0]), masks, scores)
    (_, _, best), history = jax.lax.scan(step, start_state, jax.random.split(key, generations))
    return Found(*best, history)


def _children(key: jax.Array, a: jax.Array, b: jax.Array, crossover: Any, mutation: Any) -> jax.Array:
    mixed, chosen, flipped = jax.random.split(key, 3)
    mixes = jax.random.bernoulli(mixed, jnp.float32(crossover), (a.shape[0], 1))
    children = jnp.where(mixes & jax.random.bernoulli(chosen, jnp.float32(0.5), a.shape), b, a)
    return children ^ jax.random.bernoulli(flipped, jnp.float32(mutation), a.shape)


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

    Returns:
      A :class:`Front`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> front = search.genetic_front(lambda m: jnp.stack([m.mean(), -m.mean()]), jax.random.key(0), 4, generations=5)
      >>> int(front.rank.max())
      0
    """
    # Not infinity, between which there is no distance.
    measure = jax.vmap(lambda mask: jnp.nan_to_num(objectives(mask), nan=-1e30))
    rate = 1 / length if mutation is None else mutation

    def ordered(masks: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        rank = dominance.ranks(scores)
        best = jnp.lexsort((-dominance.crowding(scores, rank), rank))[:population]
        return masks[best], scores[best]

    def step(state: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        masks, scores = state
        chosen, made = jax.random.split(key)
        # The population stands in order, so the winner of a tournament is the lower index.
        parents = jax.random.randint(chosen, (2, 2, population), 0, population).min(0)
        children = _children(made, masks[parents[0]], masks[parents[1]], crossover, rate)
        return ordered(jnp.concatenate([masks, children]), jnp.concatenate([scores, measure(children)])), None

    start, key = jax.random.split(key)
    masks = jax.random.bernoulli(start, jnp.float32(density), (population, length))
    first = ordered(masks, measure(masks))
    (masks, scores), _ = jax.lax.scan(step, first, jax.random.split(key, generations))
    return Front(masks, scores, dominance.ranks(scores))


def weight_agnostic(
    score: Callable[[jax.Array, jax.Array], jax.Array],
    weights: Sequence[float] = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0),
) -> Callable[[jax.Array], jax.Array]:
    """Objectives of networks that work without training: all weights are one number (Gaier & Ha 2019, 1906.04358).

    A mask says which connections there are, and all of them share one weight, drawn anew each time. Of a mask count the
    mean score over some such weights, the best one, and how few connections it has: the three that the paper ranks by,
    of which it takes the mean with one or the other of the two at a time. Units and activation functions are there from
    the start, where the paper adds them one by one: a bit may stand for any of them.

    Args:
      score: ``score(mask, weight)``, a number, higher is better.
      weights: the shared weights that are tried.

    Returns:
      A function of a mask for :func:`genetic_front`: (mean, best, minus the share of ones), each higher is better.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> objectives = search.weight_agnostic(lambda mask, weight: mask.sum() * weight, (0.5, 1.0))
      >>> objectives(jnp.array([True, False, False, False])).tolist()
      [0.75, 1.0, -0.25]
      >>> front = search.genetic_front(objectives, jax.random.key(0), 4, population=8, generations=5)
    """
    tried = jnp.asarray(weights, jnp.float32)

    def objectives(mask: jax.Array) -> jax.Array:
        scores = jax.vmap(lambda weight: score(mask, weight))(tried)
        return jnp.stack([jnp.mean(scores), jnp.max(scores), -jnp.mean(mask.astype(jnp.float32))])

    return objectives
