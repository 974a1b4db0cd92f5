"""Training at a fixed budget: what every way to prune is given, and what is compiled once for all of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from experiments import lab
from experiments.compress import State, fit, make_step
from experiments.data import Data
from jcompress.prune import dynamic

PyTree = Any
Masks = Mapping[str, jax.Array]
KERNELS = ".*kernel"
"""What is pruned. Biases, norms and embeddings stay dense, and do not count in the sparsity."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Those of the digits; fork it, or change a value with ``--config.<name>=<value>``."""

    name: str = "digits"
    data: str = "digits"
    data_options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"val": 0.2, "test": 0.2})
    models: tuple[str, ...] = ("lenet_300_100", "cnn")
    model_options: dict[str, dict] = dataclasses.field(default_factory=dict)
    ways: tuple[str, ...] = ()  # names in experiments/pruning/ways.py; all of them by default
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    seeds: int = 3

    steps: dict[str, int] = dataclasses.field(  # the budget, the dense half included
        default_factory=lambda: {"lenet_300_100": 2400, "cnn": 1600}
    )
    batch_size: dict[str, int] = dataclasses.field(default_factory=lambda: {"lenet_300_100": 64, "cnn": 64})
    learning_rate: float = 2e-3  # of Adam at its peak, for all training
    gate_rate: float = 10.0  # gates and scores learn faster than weights, by this
    pressure: float = 10.0  # on the density of hard concrete gates
    examples: int = 512  # that SNIP, GraSP, Wanda and SparseGPT look at


class Lab(lab.Lab):
    """One model on one data set, with a budget of ``config.steps`` steps for everything that leads to a sparse network.

    What is pruned after training spends half of them on the dense network, which all such ways share.

    Args:
      model: its name.
      config: what to measure.
      load: ``load(seed) -> Data``.
    """

    def __init__(self, model: str, config: Config, load: Callable[[int], Data]) -> None:
        super().__init__(model, load, config.model_options.get(model))
        self.config = config
        self.steps, self.half = config.steps[model], config.steps[model] // 2
        self._trained: dict[Hashable, PyTree] = {}

    def batch(self, seed: int, size: int) -> tuple[jax.Array, jax.Array]:
        """The first training examples in the order of this seed."""
        split = self.load(seed).train
        index = next(lab.batches(jax.random.key(1_000 + seed), len(split), size))
        return jnp.asarray(split.x[index]), jnp.asarray(split.y[index])

    def optimizer(self, steps: int, scale: float = 1.0) -> optax.GradientTransformation:
        """Adam with a cosine to zero, with which everything is trained."""
        return optax.adam(optax.cosine_decay_schedule(scale * self.config.learning_rate, steps))

    def fit(self, step: Callable[..., Any], state: State, held: PyTree, steps: int, key: jax.Array, seed: int) -> Any:
        """Train on the split of this seed; only the key decides the batches."""
        size = self.config.batch_size[self.name]
        return fit(step, state, held, self.load(seed).train, steps=steps, batch_size=size, key=key, title=self.name)

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
        step = self.once(("sparse", rule, steps, every, bool(masks)), lambda: make_step(self.apply, lambda pace: tx))
        params = dynamic.lay(jax.tree.map(jnp.copy, params), masks)
        state = State(params, tx.init(params), jnp.zeros((), jnp.int32))
        return self.fit(step, state, (), steps, self.order(seed, key), seed).params

    def order(self, seed: int, number: int) -> jax.Array:
        """The key of an order of examples: 1 from the start, 2 for the second half, 3 for the last of it."""
        return jax.random.fold_in(jax.random.key(seed), number)

    def dense(self, seed: int) -> PyTree:
        """The network trained with half of the budget."""
        return self._last(("dense", seed), lambda: self.sparse(self.start(seed), {}, seed, self.half))

    def early(self, seed: int) -> PyTree:
        """The network as it was a twentieth into that training."""
        steps = max(self.half // 20, 1)

        def train_a_little() -> PyTree:
            tx = self.optimizer(self.half)
            step = self.once("early", lambda: make_step(self.apply, lambda pace: tx))
            params = self.start(seed)
            state = State(params, tx.init(params), jnp.zeros((), jnp.int32))
            return self.fit(step, state, (), steps, self.order(seed, 1), seed).params

        return self._last(("early", seed), train_a_little)

    def _last(self, key: Hashable, make: Callable[[], PyTree]) -> PyTree:
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
