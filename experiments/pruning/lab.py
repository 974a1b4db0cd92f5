"""Training at a fixed budget: what every way to prune is given, and what is compiled once for all of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import jcompress as jc
from experiments import models, train
from experiments.data import Data, Split
from jcompress.prune import dynamic

PyTree = Any
Masks = Mapping[str, jax.Array]
KERNELS = ".*kernel"
"""What is pruned. Biases, norms and embeddings stay dense, and do not count in the sparsity."""


class Lab:
    """One model on one data set, with a budget of ``config.steps`` steps for everything that leads to a sparse network.

    What is pruned after training spends half of them on the dense network, which all such ways share.

    Args:
      name: of the model.
      config: see ``experiments/configs/pruning``.
      load: ``load(seed) -> Data``.
    """

    def __init__(self, name: str, config: ConfigDict, load: Callable[[int], Data]) -> None:
        self.name, self.config = name, config
        self.load = functools.lru_cache(maxsize=1)(load)
        data = self.load(0)
        models.check(name, data.kind)
        self.kind = data.kind
        self.module = models.build(name, data.classes, config.model_options.get(name, {}))
        self.apply = models.apply(self.module)
        self.evaluate = train.make_evaluate(self.apply)
        self.steps, self.half = config.steps[name], config.steps[name] // 2
        self._compiled: dict[Hashable, Any] = {}
        self._trained: dict[Hashable, PyTree] = {}
        self.shapes = jax.eval_shape(self.module.init, jax.random.key(0), data.test.x[:1])["params"]
        self.initialize = jax.jit(lambda key: self.module.init(key, data.train.x[:1])["params"])

    def start(self, seed: int) -> PyTree:
        """Fresh parameters."""
        return self.initialize(jax.random.key(seed))

    def loss(self, params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        """Mean cross entropy."""
        return train.cross_entropy(self.apply(params, x), y).mean()

    def batch(self, seed: int, size: int) -> tuple[jax.Array, jax.Array]:
        """The first training examples in the order of this seed."""
        split = self.load(seed).train
        index = next(train.batches(jax.random.key(1_000 + seed), len(split), size))
        return jnp.asarray(split.x[index]), jnp.asarray(split.y[index])

    def optimizer(self, steps: int, scale: float = 1.0) -> optax.GradientTransformation:
        """Adam with a cosine to zero, with which everything is trained."""
        return optax.adam(optax.cosine_decay_schedule(scale * self.config.learning_rate, steps))

    def compiled(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What ``build`` gives, built once."""
        if key not in self._compiled:
            self._compiled[key] = build()
        return self._compiled[key]

    def fit(
        self, step: Callable[..., Any], state: train.State, held: PyTree, steps: int, key: jax.Array, seed: int
    ) -> Any:
        """Train on the split of this seed; only the key decides the batches."""
        split: Split = self.load(seed).train
        size = self.config.batch_size[self.name]
        return train.fit(step, state, held, split, steps=steps, batch_size=size, key=key, title=self.name)

    def sparse(
        self,
        params: PyTree,
        masks: Masks,
        seed: int,
        steps: int,
        rule: Any = None,
        every: int = 1_000_000,
        key: int = 1,
    ) -> PyTree:
        """Train with masks, fixed or moved by a rule; without masks, the dense network."""
        rule = dynamic.Static() if rule is None else rule
        tx = dynamic.sparse(self.optimizer(steps), rule, dict(masks), every=every, key=jax.random.key(seed))
        step = self.compiled(("sparse", rule, steps, every, bool(masks)), lambda: train.make_step(self.apply, tx))
        params = dynamic.lay(jax.tree.map(jnp.copy, params), masks)
        state = train.State(params, tx.init(params), jnp.zeros((), jnp.int32))
        return self.fit(step, state, (), steps, self.order(seed, key), seed).params

    def order(self, seed: int, number: int) -> jax.Array:
        """The key of an order of examples: 1 from the start, 2 for the second half, 3 for the last of it."""
        return jax.random.fold_in(jax.random.key(seed), number)

    def dense(self, seed: int) -> PyTree:
        """The network trained with half of the budget."""
        return self._once(("dense", seed), lambda: self.sparse(self.start(seed), {}, seed, self.half))

    def early(self, seed: int) -> PyTree:
        """The network as it was a twentieth into that training."""
        steps = max(self.half // 20, 1)

        def train_a_little() -> PyTree:
            tx = self.optimizer(self.half)
            step = self.compiled("early", lambda: train.make_step(self.apply, tx))
            params = self.start(seed)
            state = train.State(params, tx.init(params), jnp.zeros((), jnp.int32))
            return self.fit(step, state, (), steps, self.order(seed, 1), seed).params

        return self._once(("early", seed), train_a_little)

    def _once(self, key: Hashable, make: Callable[[], PyTree]) -> PyTree:
        if key not in self._trained:
            # The last seed only: the networks of others are not needed again.
            self._trained = {k: v for k, v in self._trained.items() if k[1] == key[1]}  # type: ignore[index]
            self._trained[key] = make()
        return self._trained[key]

    def finetune(self, params: PyTree, masks: Masks, seed: int, steps: int | None = None) -> PyTree:
        """Train what the masks keep with the second half of the budget, or the last of it."""
        return self.sparse(params, masks, seed, self.half if steps is None else steps, key=2)

    def plan(self, method: Any) -> jc.Plan:
        """The plan that prunes all kernels by this method."""
        return jc.plan(self.shapes, [(KERNELS, method)])

    def masks(self, params: PyTree, plan: jc.Plan, seed: int, **known: Any) -> dict[str, jax.Array]:
        """The masks that a plan chooses."""
        tree = jc.compress(params, plan, key=jax.random.key(10_000 + seed), **known)
        return {path: node.mask for path, node in jc.paths(tree) if path in plan and plan[path] is not None}

    def score(self, params: PyTree, seed: int) -> dict[str, float]:
        """How good the network is, and how many of its prunable weights are not zero."""
        data = self.load(seed)
        kernels = [x for path, x in jc.paths(params) if re.fullmatch(KERNELS, path)]
        kept, size = sum(int((x != 0).sum()) for x in kernels), sum(x.size for x in kernels)
        row: dict[str, float] = {"kept": kept, "of": size}
        for split in ("val", "test"):
            found = self.evaluate(params, getattr(data, split))
            row |= {f"{split}_accuracy": found.accuracy, f"{split}_bits": found.bits}
        return row
