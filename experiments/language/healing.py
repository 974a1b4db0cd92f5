"""Healing: what is compressed stays as it is, and a low rank beside each kernel learns from the dense model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jcompress as jc
from experiments.models import llama
from jcompress.formats import Frozen, LowRank, Sum

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Healing:
    """How long and by what.

    Attributes:
      steps: of Adam, with a learning rate that falls to zero as a cosine.
      rank: beside each kernel (Hu et al. 2021, arXiv:2106.09685); stored in 16 bits.
      learning_rate: at the beginning.
      length: tokens of a window, drawn anew in each step from the first half of the text.
      windows: in a step.
    """

    steps: int = 100
    rank: int = 8
    learning_rate: float = 1e-3
    length: int = 256
    windows: int = 1

    def __call__(
        self, params: PyTree, layers: Sequence[PyTree], config: llama.Config, tokens: np.ndarray, seed: int
    ) -> list[PyTree]:
        """The layers with what was learned: the cross-entropy to the dense model's predictions falls.

        Meanwhile each kernel is what its node stands for, dense, so that all methods share one program; only the low
        rank has gradients. Layers that differ in shape, as after cuts, have a program of their own, without a loop.

        Args:
          params: dense, layers as a list.
          layers: the same layers compressed.
          config: the model.
          tokens: of the text.
          seed: of the adapters and of the windows.
        """
        teacher, keys = llama.stack(params), jax.random.split(jax.random.key(seed), len(layers))
        dense = (jax.tree.map(lambda x: x.astype(jnp.float32), jc.materialize(layer)) for layer in layers)
        adapted = [self._adapted(layer, key) for layer, key in zip(dense, keys, strict=True)]
        alike = len({str(jax.tree.map(jnp.shape, layer)) for layer in adapted}) == 1
        train, held = jc.split(jax.tree.map(lambda *x: jnp.stack(x), *adapted) if alike else adapted)
        optimizer, step = _step(self, config)
        state = optimizer.init(train)
        for window in self._drawn(tokens[: len(tokens) // 2], seed):
            train, state = step(train, state, held, teacher, window)
        own = [jax.tree.map(lambda x, i=i: x[i], train) for i in range(len(layers))] if alike else train
        return [_learned(*pair) for pair in zip(layers, own, strict=True)]

    def _drawn(self, tokens: np.ndarray, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        for _ in range(self.steps):
            starts = rng.integers(0, len(tokens) - self.length, self.windows)
            yield jnp.asarray(np.stack([tokens[i : i + self.length] for i in starts]), jnp.int32)

    def _adapted(self, layer: PyTree, key: jax.Array) -> PyTree:
        """An adapter on each kernel; whatever else there is stays as it is."""
        found, tree = jax.tree.flatten(layer)
        keys = jax.random.split(key, len(found))
        pairs = zip(found, keys, strict=True)
        made = [jc.factorize.adapter(x, self.rank, k) if x.ndim > 1 else Frozen.of(x) for x, k in pairs]
        return jax.tree.unflatten(tree, made)


@functools.cache
def _step(healing: Healing, config: llama.Config) -> tuple[optax.GradientTransformation, Any]:
    """Adam, and a step of it that lowers the cross-entropy to the dense model's predictions."""
    optimizer = optax.adam(optax.cosine_decay_schedule(healing.learning_rate, healing.steps))
    apply = jc.accelerate(lambda params, window: llama.apply(params, window, config))

    def loss(train: PyTree, held: PyTree, teacher: PyTree, window: jax.Array) -> jax.Array:
        goal = jax.nn.softmax(llama.apply(teacher, window, config))
        found = jax.nn.log_softmax(apply({**teacher, "layers": jc.merge(train, held)}, window))
        return -jnp.mean(jnp.sum(goal * found, -1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(train: PyTree, state: Any, held: PyTree, teacher: PyTree, window: jax.Array) -> tuple[PyTree, Any]:
        updates, state = optimizer.update(jax.grad(loss)(train, held, teacher, window), state)
        return optax.apply_updates(train, updates), state

    return optimizer, step


def _learned(layer: PyTree, train: PyTree) -> PyTree:
    """The nodes of a layer, each with its low rank in 16 bits beside it."""
    is_node = lambda x: isinstance(x, jc.Compressed)  # noqa: E731
    nodes, tree = jax.tree.flatten(layer, is_leaf=is_node)
    sums = jax.tree.leaves(train, is_leaf=is_node)
    made = [_beside(node, low) for node, low in zip(nodes, sums, strict=True)]
    return jax.tree.unflatten(tree, made)


def _beside(node: Any, trained: Any) -> Any:
    if not isinstance(trained, Sum):
        return node
    low = trained.terms[1]
    return Sum((node, LowRank(low.u.astype(jnp.float16), low.v.astype(jnp.float16))))
