"""Search by a distribution over masks that moves towards the better ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jcompress.numeric import extremes
from jcompress.prune.search.evolution import Fitness, Found

_Move = Callable[[Any, jax.Array, jax.Array, jax.Array], Any]


def pbil(
    fitness: Fitness,
    key: jax.Array,
    length: int,
    *,
    population: int = 64,
    generations: int = 100,
    best: int = 8,
    rate: float = 0.2,
    density: float = 0.5,
) -> Found:
    """Population-based incremental learning, an estimation of distribution algorithm (Baluja 1994).

    Bits are drawn independently, each with a probability of its own, which moves towards how often the best masks of
    a generation have it: ``p <- (1 - rate) p + rate mean(best)``. With a rate of 1 it is the univariate marginal
    algorithm. Probabilities stay ``1 / length`` away from 0 and 1, so that no bit is given up. Such searches pruned
    networks in Cantu-Paz (2003).

    Args:
      fitness: of one mask, higher is better.
      key: a PRNG key.
      length: bits of a mask.
      population: masks in a generation.
      generations: how many.
      best: how many of them the probabilities follow.
      rate: how far, in (0, 1].
      density: every probability at the start.

    Returns:
      A :class:`Found`.

    Raises:
      ValueError: for more of the best than there are, or a rate outside (0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> goal = jnp.array([True, False, True, True, False, True])
      >>> search.pbil(lambda mask: (mask == goal).mean(), jax.random.key(0), 6, generations=20).best.tolist()
      [True, False, True, True, False, True]
    """
    if not 1 <= best <= population:
        raise ValueError(f"pbil: best={best} must be in 1 .. population={population}")
    if not 0 < rate <= 1:
        raise ValueError(f"pbil: rate={rate} must be in (0, 1]")
    edge = min(1 / length, 0.5)

    def move(p: jax.Array, drawn: jax.Array, masks: jax.Array, scores: jax.Array) -> jax.Array:
        top = masks[jnp.argsort(scores, descending=True)[:best]]
        return jnp.clip((1 - rate) * p + rate * top.mean(0), edge, 1 - edge)

    return _search(fitness, key, jnp.full(length, density, jnp.float32), lambda p: p, move, population, generations)


def reinforce(
    fitness: Fitness,
    key: jax.Array,
    length: int,
    *,
    population: int = 32,
    generations: int = 200,
    rate: float = 0.2,
    density: float = 0.5,
) -> Found:
    """A policy over masks, trained by the gradient of its expected fitness (REINFORCE; Williams 1992).

    Each bit is drawn with a probability ``sigmoid(z)``; Adam climbs ``mean (f - b) d log p / dz`` over the masks of a
    generation, where the baseline ``b`` of a mask is the mean fitness of the others, so that the gradient stays
    unbiased. The unit of a bit is what the fitness says: with layers and :func:`n2n_reward` this is the first stage of
    N2N (Ashok et al. 2018, arXiv:1709.06030), which removes layers; :func:`amc` with the same reward is its second,
    which makes the others narrower.

    Args:
      fitness: of one mask, higher is better.
      key: a PRNG key.
      length: bits of a mask.
      population: masks in a generation, two at least.
      generations: how many.
      rate: of Adam.
      density: every probability at the start.

    Returns:
      A :class:`Found`.

    Raises:
      ValueError: for a population of one, or a density outside (0, 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> error = jnp.array([0.0, 0.3, 0.0, 0.4])  # of removing each layer
      >>> reward = lambda keep: search.n2n_reward(keep.mean(), 0.9 - error @ ~keep, 0.9)
      >>> search.reinforce(reward, jax.random.key(0), 4, generations=50).best.tolist()
      [False, True, False, True]
    """
    if population < 2:
        raise ValueError(f"reinforce: population={population} must be at least 2: others are the baseline of each")
    if not 0 < density < 1:
        raise ValueError(f"reinforce: density={density} must be in (0, 1)")
    tx = optax.adam(rate)
    start = jnp.full(length, jnp.log(density / (1 - density)), jnp.float32)

    def move(policy: Any, drawn: jax.Array, masks: jax.Array, scores: jax.Array) -> Any:
        logits, state = policy
        updates, state = tx.update(-policy_gradient(drawn, masks, scores), state)
        return optax.apply_updates(logits, updates), state

    return _search(
        fitness, key, (start, tx.init(start)), lambda policy: jax.nn.sigmoid(policy[0]), move, population, generations
    )


def policy_gradient(p: jax.Array, masks: jax.Array, scores: jax.Array) -> jax.Array:
    """An unbiased estimate of the gradient of the expected fitness in the logits of the bits, from masks drawn.

    A fitness that is no number counts as the worst of the others.
    """
    count, known = len(masks), jnp.isfinite(scores)
    worst = jnp.min(scores, initial=jnp.finfo(scores.dtype).max, where=known)
    finite = jnp.where(known, scores, jnp.where(known.any(), worst, 0))
    others = (jnp.sum(finite) - finite) / (count - 1)
    return jnp.mean((finite - others)[:, None] * (masks - p), axis=0)


def n2n_reward(size: jax.Array | float, accuracy: jax.Array | float, teacher: jax.Array | float) -> jax.Array | float:
    """Smaller and as good as the teacher: ``c (2 - c) accuracy / teacher`` with ``c = 1 - size`` (Ashok et al. 2018).

    The slope in ``c`` falls to nothing at 1, so what is won in size never pays for all of the accuracy.

    Args:
      size: of the student, as a part of the teacher's: parameters, bytes or multiply-adds.
      accuracy: of the student.
      teacher: the accuracy of the teacher.

    Returns:
      The reward, higher is better; 0 for a student of the size of its teacher.

    Example:
      >>> import jcompress as jc
      >>> jc.prune.search.n2n_reward(0.5, 0.9, 0.9)
      0.75

    Paper: arXiv:1709.06030.
    """
    c = 1 - size
    return c * (2 - c) * accuracy / teacher


def _search(
    fitness: Fitness,
    key: jax.Array,
    start: Any,
    probabilities: Callable[[Any], jax.Array],
    move: _Move,
    population: int,
    generations: int,
) -> Found:
    """Draw, judge, move; the best mask ever met is kept."""
    length = len(probabilities(start))

    def step(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        policy, best, top = state
        drawn = probabilities(policy)
        masks = jax.random.bernoulli(key, drawn.astype(jnp.float32), (population, length))
        scores = extremes.lowest(jax.vmap(fitness)(masks)).astype(jnp.float32)
        place = jnp.argmax(scores)
        best, top = jnp.where(scores[place] > top, masks[place], best), jnp.maximum(scores[place], top)
        return (move(policy, drawn, masks, scores), best, top), top

    first = start, jnp.zeros(length, bool), jnp.float32(-jnp.inf)
    (_, best, top), history = jax.lax.scan(step, first, jax.random.split(key, generations))
    return Found(best, top, history)
