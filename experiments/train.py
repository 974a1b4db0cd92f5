"""A plain training loop. Fork it: nothing here knows about compression."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.data import Split

PyTree = Any
Apply = Callable[[PyTree, jax.Array], jax.Array]
Forward = Callable[[PyTree, PyTree, jax.Array], PyTree]


class State(NamedTuple):
    """What training changes: parameters, optimizer state, and the number of steps taken."""

    params: PyTree
    opt_state: PyTree
    step: jax.Array


def make_step(apply: Apply, tx: optax.GradientTransformation, forward: Forward | None = None) -> Callable[..., Any]:
    """One jitted step, ``step(state, held, x, y, index) -> (state, loss)``; ``state`` is donated.

    Args:
      apply: the model, ``apply(params, x) -> logits``.
      tx: the optimizer. It gets the raw gradients as the extra argument ``grads``.
      forward: from what is trained to the parameters of the model, ``forward(params, held, step)``.
    """
    tx = optax.with_extra_args_support(tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, held: PyTree, x: jax.Array, y: jax.Array, index: jax.Array) -> tuple[State, jax.Array]:
        def loss(params: PyTree) -> jax.Array:
            dense = params if forward is None else forward(params, held, state.step)
            return cross_entropy(apply(dense, x[index]), y[index]).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, grads=grads)
        return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1), value

    return step


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Loss of each example, or of each byte, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)


def fit(
    step: Callable[..., Any],
    state: State,
    held: PyTree,
    split: Split,
    *,
    steps: int,
    batch_size: int,
    key: jax.Array,
    title: str = "",
    after: Callable[[State, int], None] | None = None,
) -> State:
    """Train until ``steps`` steps are taken, from wherever ``state`` stands.

    The batches depend on the key and the step only, so a run that continues sees what an unbroken one would have.

    Args:
      step: from :func:`make_step`.
      state: where to start; donated.
      held: passed through to ``step``.
      split: training examples.
      steps: the number of steps in total.
      batch_size: examples a step.
      key: of the order of the examples.
      title: shown on the progress bar, which is quiet where there is no terminal.
      after: called after each step with the state and the number of steps taken.
    """
    x, y, first = jnp.asarray(split.x), jnp.asarray(split.y), int(state.step)
    with tqdm(
        total=steps, initial=first, desc=title, unit="step", disable=None, leave=False, dynamic_ncols=True
    ) as bar:
        for done, index in zip(range(first + 1, steps + 1), batches(key, len(split), batch_size, first), strict=False):
            state, loss = step(state, held, x, y, index)
            bar.update()
            if not bar.disable and done % 50 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            if after is not None:
                after(state, done)
    return state


def steps_in(epochs: float, examples: int, batch_size: int) -> int:
    """Steps in so many epochs; a last incomplete batch is left out."""
    return max(round(epochs * max(examples // batch_size, 1)), 1)


def batches(key: jax.Array, examples: int, batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
    """Indices of one batch after another, in a new order each epoch, from step ``start`` on."""
    batch_size = min(batch_size, examples)
    per_epoch = examples // batch_size
    epoch, place = divmod(start, per_epoch)
    while True:
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), examples))
        for i in range(place, per_epoch):
            yield order[i * batch_size : (i + 1) * batch_size]
        epoch, place = epoch + 1, 0


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model does: right answers, answers, and the summed loss in nats."""

    correct: int
    total: int
    nats: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def bits(self) -> float:
        """Mean loss in bits: for text, bits per byte."""
        return self.nats / self.total / math.log(2)


def make_evaluate(apply: Apply, batch_size: int = 512) -> Callable[[PyTree, Split], Score]:
    """A function ``evaluate(params, split) -> Score`` that compiles once."""

    @jax.jit
    def one(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = apply(params, x)
        return (logits.argmax(-1) == y).sum(), cross_entropy(logits, y).sum()

    def evaluate(params: PyTree, split: Split) -> Score:
        correct, nats, size = 0, 0.0, batch_size if split.y.ndim == 1 else max(batch_size // 16, 1)
        for i in range(0, len(split), size):
            right, loss = one(params, split.x[i : i + size], split.y[i : i + size])
            correct, nats = correct + int(right), nats + float(loss)
        return Score(correct, int(split.y.size), nats)

    return evaluate
