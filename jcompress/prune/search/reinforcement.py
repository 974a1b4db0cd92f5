"""Search by a learned policy: how much of each layer to keep under a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcompress.core import PyTree
from jcompress.prune.search.evolution import Found

Score = Callable[[jax.Array], jax.Array]
_Layers = list[tuple[jax.Array, jax.Array]]


class Experience(NamedTuple):
    """What an agent has met: (size, ...) states, actions, rewards, the states that followed, and whether any did."""

    state: jax.Array
    action: jax.Array
    reward: jax.Array
    after: jax.Array
    goes_on: jax.Array


class Agent(NamedTuple):
    """Actor, critic, the slow copies of both, and what their optimizers remember."""

    actor: _Layers
    critic: _Layers
    slow: tuple[_Layers, _Layers]
    memory: tuple[PyTree, PyTree]


class _Task(NamedTuple):
    """What an agent is put before: layers, their costs, and a budget that every episode keeps.

    Attributes:
      share: of each layer in the cost, float32 (layers,).
      later: what the layers after each cost.
      room: the budget in these shares.
      known: more of each layer, (layers, n).
      least: the smallest kept fraction.
    """

    share: jax.Array
    later: jax.Array
    room: float
    known: jax.Array
    least: float

    @classmethod
    def of(cls, costs: Any, budget: float, features: jax.Array | None, least: float) -> _Task:
        """From costs in any unit."""
        price = np.asarray(costs, np.float64)
        if not 0 < least <= 1 or least * price.sum() > budget:
            raise ValueError(
                f"amc: budget={budget} is less than least={least} of all costs, {least * price.sum():g}; lower least "
                "or raise the budget"
            )
        if features is not None and (jnp.ndim(features) != 2 or len(features) != len(price)):
            raise ValueError(
                f"amc: features of shape {jnp.shape(features)}, expected ({len(price)}, n), a row for each layer"
            )
        layers, share = len(price), jnp.asarray(price / price.sum(), jnp.float32)
        later = jnp.asarray([price[i + 1 :].sum() / price.sum() for i in range(layers)], jnp.float32)
        # A little less than the budget: sums are rounded.
        room, place = float(budget / price.sum()) * (1 - 1e-6), jnp.eye(layers, dtype=jnp.float32)
        known = place if features is None else jnp.concatenate([place, jnp.asarray(features, jnp.float32)], 1)
        return cls(share, later, room, known, least)

    def seen(self, i: jax.Array, spent: jax.Array, last: jax.Array) -> jax.Array:
        """The state at a layer."""
        now = jnp.stack([self.share[i], spent, self.later[i], last])
        return jnp.concatenate([now, self.known[i]])

    def episode(
        self, actor: _Layers, deviation: jax.Array, random: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Kept fractions, and the states that they were chosen in, that after the last one too."""
        least = self.least

        def one(state: tuple, now: tuple) -> tuple:
            spent, last = state
            i, key = now
            first, second = jax.random.split(key)
            met = self.seen(i, spent, last)
            mean = _act(actor, met, least)
            ends = (least - mean) / deviation, (1 - mean) / deviation
            noisy = mean + deviation * jax.random.truncated_normal(first, *ends, dtype=jnp.float32)
            keep = jnp.where(random, jax.random.uniform(second, (), jnp.float32, least, 1), noisy)
            most = (self.room - spent - least * self.later[i]) / self.share[i]
            keep = jnp.clip(keep, least, jnp.clip(most, least, 1))
            return (spent + keep * self.share[i], keep), (keep, met)

        layers, start = len(self.share), (jnp.float32(0), jnp.float32(1))
        steps = jnp.arange(layers), jax.random.split(key, layers)
        found: tuple = jax.lax.scan(one, start, steps)
        (spent, last), (keep, states) = found
        return keep, jnp.concatenate([states, self.seen(jnp.int32(layers - 1), spent, last)[None]])


def amc(
    fitness: Score,
    key: jax.Array,
    costs: Sequence[float] | jax.Array,
    budget: float,
    *,
    features: jax.Array | None = None,
    least: float = 0.1,
    episodes: int = 400,
    warmup: int = 100,
    noise: float = 0.5,
    decay: float = 0.99,
    width: int = 64,
    batch: int = 64,
    memory: int = 2000,
    rates: tuple[float, float] = (1e-3, 1e-3),
    follow: float = 0.01,
) -> Found:
    """AMC: an agent chooses the kept fraction of one layer after the other (He et al. 2018, arXiv:1802.03494).

    A deterministic policy gradient with a replay buffer. The state of a layer is which it is, its share of the cost,
    what was spent before it, what the layers after it cost, the fraction that the layer before it kept, and
    ``features``. An action can never spend what the layers after it need at their least, so every policy that is tried
    meets the budget. All layers of an episode share its reward, less the running mean of rewards and over their
    deviation. Actions of the first episodes are uniform; then they are the actor's, with normal noise, truncated to
    the range, that decays.

    Args:
      fitness: of the kept fractions, float32 (layers,), higher is better; traceable, as for the other searches. It
        prunes by them, magnitude within a layer for one, and gives the accuracy on validation data.
      key: a PRNG key.
      costs: of each layer where all of it is kept: parameters, multiply-adds, or measured seconds.
      budget: of the whole, in the unit of ``costs``; that of a layer is taken to be its kept fraction times its cost.
      features: more of each layer, (layers, n), scaled to about 1: kernel size, stride, outputs.
      least: the smallest kept fraction.
      episodes: how often the fitness is asked.
      warmup: the episodes of random actions among these. With ``warmup=episodes`` the search is a random one.
      noise: standard deviation at first.
      decay: of the noise in an episode.
      width: of both hidden layers of actor and critic.
      batch: transitions in an update; there is one update for each layer of an episode.
      memory: transitions that are kept.
      rates: of actor and critic.
      follow: how far the slow copies move towards the learned ones in an update.

    Returns:
      The best kept fractions, their fitness, and the best fitness up to each episode.

    Raises:
      ValueError: for a budget that no fractions of at least ``least`` meet, ``warmup`` beyond ``episodes``, a memory
        smaller than an episode, or features of another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import search
      >>> hurts = jnp.array([0.1, 4.0])  # what it costs in accuracy to prune the one layer, and the other
      >>> found = search.amc(lambda keep: -hurts @ (1 - keep), jax.random.key(0), [100.0, 100.0], 120.0, episodes=150)
      >>> keep = found.best
      >>> bool(keep.sum() <= 1.2), bool(keep[1] > 0.9)
      (True, True)
    """
    task = _Task.of(costs, budget, features, least)
    layers = len(task.share)
    if not 0 <= warmup <= episodes:
        raise ValueError(f"amc: warmup={warmup} must be in 0 .. episodes={episodes}")
    if memory < layers:
        raise ValueError(f"amc: memory={memory} must hold an episode, {layers} transitions")
    optimizers = optax.adam(rates[0]), optax.adam(rates[1])

    def step(state: tuple, now: tuple) -> tuple:
        agent, met, mean, best, top = state
        number, key = now
        first, second = jax.random.split(key)
        random = number < warmup
        deviation = noise * decay ** jnp.maximum(number - warmup, 0).astype(jnp.float32)
        keep, states = task.episode(agent.actor, jnp.maximum(deviation, 1e-3), random, first)
        score = jnp.asarray(fitness(keep), jnp.float32)
        moments = jnp.stack([score, score**2])
        mean = jnp.where(number == 0, moments, 0.95 * mean + 0.05 * moments)
        spread = jnp.sqrt(jnp.maximum(mean[1] - mean[0] ** 2, 1e-12))
        new = Experience(
            states[:-1], keep, jnp.full(layers, (score - mean[0]) / spread / layers), states[1:],
            (jnp.arange(layers) < layers - 1).astype(jnp.float32),
        )  # fmt: skip
        at = (number * layers + jnp.arange(layers)) % memory
        met = jax.tree.map(lambda x, y: x.at[at].set(y), met, new)
        full = jnp.minimum((number + 1) * layers, memory)

        def update(agent: Agent, key: jax.Array) -> tuple[Agent, None]:
            chosen = jax.random.randint(key, (batch,), 0, full)
            return _learned(agent, jax.tree.map(lambda x: x[chosen], met), optimizers, least, follow), None

        agent = jax.lax.cond(
            random, lambda: agent, lambda: jax.lax.scan(update, agent, jax.random.split(second, layers))[0]
        )
        best, top = jnp.where(score > top, keep, best), jnp.maximum(score, top)
        return (agent, met, mean, best, top), top

    first, second, third = jax.random.split(key, 3)
    size = 4 + task.known.shape[1]
    nets = _network(first, (size, width, width, 1)), _network(second, (size + 1, width, width, 1))
    agent = Agent(*nets, jax.tree.map(jnp.copy, nets), tuple(o.init(n) for o, n in zip(optimizers, nets, strict=True)))
    one, seen, moments, none = (jnp.zeros(shape, jnp.float32) for shape in (memory, (memory, size), 2, layers))
    start: tuple[Any, ...] = agent, Experience(seen, one, one, seen, one), moments, none, jnp.float32(-jnp.inf)
    numbers = jnp.arange(episodes), jax.random.split(third, episodes)
    found: tuple = jax.lax.scan(step, start, numbers)
    (*_, best, top), history = found
    return Found(best, top, history)


def _learned(
    agent: Agent, some: Experience, optimizers: tuple[optax.GradientTransformation, ...], least: float, follow: float
) -> Agent:
    """The critic a step towards what the slow copies expect, then the actor towards what the critic likes."""
    target = some.reward + some.goes_on * _value(agent.slow[1], some.after, _act(agent.slow[0], some.after, least))
    wrong = jax.grad(lambda c: jnp.mean((_value(c, some.state, some.action) - target) ** 2))(agent.critic)
    change, second = optimizers[1].update(wrong, agent.memory[1])
    critic = optax.apply_updates(agent.critic, change)
    worth = jax.grad(lambda a: -jnp.mean(_value(critic, some.state, _act(a, some.state, least))))(agent.actor)
    change, first = optimizers[0].update(worth, agent.memory[0])
    actor = optax.apply_updates(agent.actor, change)
    slow = jax.tree.map(lambda x, y: x + follow * (y - x), agent.slow, (actor, critic))
    return Agent(actor, critic, slow, (first, second))


def _network(key: jax.Array, widths: Sequence[int]) -> _Layers:
    keys = jax.random.split(key, len(widths) - 1)
    sizes = zip(keys, widths[:-1], widths[1:], strict=True)
    return [(jax.random.normal(k, (m, n), jnp.float32) * m**-0.5, jnp.zeros(n, jnp.float32)) for k, m, n in sizes]


def _forward(layers: _Layers, x: jax.Array) -> jax.Array:
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = layers[-1]
    return (x @ w + b)[..., 0]


def _act(actor: _Layers, state: jax.Array, least: float) -> jax.Array:
    """The actor's kept fraction."""
    return least + (1 - least) * jax.nn.sigmoid(_forward(actor, state))


def _value(critic: _Layers, state: jax.Array, action: jax.Array) -> jax.Array:
    """The critic's value of an action in a state."""
    return _forward(critic, jnp.concatenate([state, action[..., None]], -1))
