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
from jcompress.formats import LowRank, Sum

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

        Args:
          params: dense, layers as a list.
          layers: the same layers compressed, all alike in form.
          config: the model.
          tokens: of the text.
          seed: of the adapters and of the windows.
        """
        keys = jax.random.split(jax.random.key(seed), len(layers))
        teacher, tree = llama.stack(params), jax.vmap(self._adapted)(_stacked(layers), keys)
        train, held = jc.split(tree)
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.steps)
        optimizer = optax.adam(schedule)
        state, half = optimizer.init(train), tokens[: len(tokens) // 2]

        def loss(train: PyTree, window: jax.Array) -> jax.Array:
            dense = {**params, "layers": jc.materialize(jc.merge(train, held))}
            goal = jax.nn.softmax(llama.apply(teacher, window, config))
            found = jax.nn.log_softmax(llama.apply(dense, window, config, remat=True))
            return -jnp.mean(jnp.sum(goal * found, -1))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(train: PyTree, state: Any, window: jax.Array) -> tuple[PyTree, Any]:
            updates, state = optimizer.update(jax.grad(loss)(train, window), state)
            return optax.apply_updates(train, updates), state

        for window in self._drawn(half, seed):
            train, state = step(train, state, window)
        tree = _narrow(jc.merge(train, held))
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(layers))]

    def _drawn(self, tokens: np.ndarray, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        for _ in range(self.steps):
            starts = rng.integers(0, len(tokens) - self.length, self.windows)
            yield jnp.asarray(np.stack([tokens[i : i + self.length] for i in starts]), jnp.int32)

    def _adapted(self, layer: PyTree, key: jax.Array) -> PyTree:
        """An adapter on each kernel; whatever else there is stays as it is."""
        found, tree = jax.tree.flatten(layer, is_leaf=lambda x: isinstance(x, jc.Compressed))
        made = []
        for node, k in zip(found, jax.random.split(key, len(found)), strict=True):
            node = jc.factorize.adapter(node, self.rank, k) if len(node.shape) > 1 else _held(node)
            made.append(node)
        return jax.tree.unflatten(tree, made)


def _held(node: Any) -> Any:
    return jax.tree.map(lambda x: jc.formats.Frozen.of(x), node)


def _stacked(layers: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def _narrow(tree: PyTree) -> PyTree:
    """Adapters in 16 bits."""

    def narrow(node: Any) -> Any:
        if not isinstance(node, Sum):
            return node
        base, low = node.terms
        return Sum((base, LowRank(low.u.astype(jnp.float16), low.v.astype(jnp.float16))))

    return jax.tree.map(narrow, tree, is_leaf=lambda x: isinstance(x, Sum))
