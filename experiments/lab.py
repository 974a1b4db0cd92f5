"""What ways share: one model on one data set, compiled once for all of them and for all seeds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models
from experiments.data import Data, Split

PyTree = Any
Apply = Callable[[PyTree, jax.Array], jax.Array]


class Lab:
    """One model on one data set.

    Args:
      model: its name, see ``experiments/models``.
      load: ``load(seed) -> Data``.
      options: fields of the model.

    Raises:
      ValueError: if there is no such model, or it does not read such data.
    """

    def __init__(self, model: str, load: Callable[[int], Data], options: Mapping[str, Any] | None = None) -> None:
        self.name, self.load = model, functools.lru_cache(maxsize=2)(load)
        data = self.load(0)
        models.check(model, data.kind)
        self.kind = data.kind
        self.module = models.build(model, data.classes, options)
        self.apply = models.apply(self.module)
        self.evaluate = make_evaluate(self.apply)
        example = data.test.x[:1]
        self.shapes = jax.eval_shape(self.module.init, jax.random.key(0), example)["params"]
        self._initialize = jax.jit(lambda key: self.module.init(key, example)["params"])
        self._once: dict[Hashable, Any] = {}

    def start(self, seed: int) -> PyTree:
        """Fresh parameters."""
        return self._initialize(jax.random.key(seed))

    def once(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What ``build`` gives, built once: for compiled functions."""
        if key not in self._once:
            self._once[key] = build()
        return self._once[key]

    def loss(self, params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        """Mean cross entropy."""
        return cross_entropy(self.apply(params, x), y).mean()

    @property
    def size(self) -> int:
        """Parameters of the dense network."""
        return sum(x.size for x in jax.tree.leaves(self.shapes))


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Loss of each example, or of each byte, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)


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
