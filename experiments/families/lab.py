"""Trained networks and what all families are given: statistics, equal fine-tuning, and the same measures."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jcompress as jc
from experiments import data as datasets
from experiments import lab, models
from experiments.compress import State, dtypes_of, fit, make_step, narrowed, widened
from experiments.models import resnet

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Config:
    """Those of the digits; fork it, or change a value with ``--config.<name>=<value>``."""

    name: str = "digits"
    data: str = "digits"
    data_options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"val": 0.2, "test": 0.2})
    model: str = "lenet_300_100"
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    ways: tuple[str, ...] = ()  # names in experiments/families/ways.py; all of them by default
    seeds: int = 3
    rules: str = ".*kernel"  # what is compressed
    kept: str = ""  # and what of that stays dense
    steps: int = 1200  # of the dense network; a pretrained one takes none
    finetuning: int = 300  # steps after compression, for every way
    batch_size: int = 64
    learning_rate: float = 2e-3  # of Adam at its peak
    finetuning_rate: float = 0.01  # of Adam at its peak, in root mean squares of each array: scales are small
    calibration: int = 512  # training examples for statistics
    test: int = 1_000_000  # at most so many test examples


class Network(NamedTuple):
    """What a way gives: parameters, compressed, and functions of them where they are others than the lab's.

    Attributes:
      tree: of arrays and nodes.
      apply: the function.
      training: the same with the statistics of the batch, where there are norms that take them.
    """

    tree: PyTree
    apply: Callable[[PyTree, Any], Any] | None = None
    training: Callable[[PyTree, Any], Any] | None = None


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call without warnings of inputs that calibration never saw: the pixels at the rim are always black."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jc.CalibrationWarning)
        return call(*args, **kwargs)


class Lab:
    """One network on one data set.

    Args:
      config: what to measure.
      data_dir: with the files of the data.
    """

    def __init__(self, config: Config, data_dir: str | None) -> None:
        self.config = config
        self.load = self._loader(data_dir)
        data = self.load(0)
        self.kind: str = data.kind
        self.about = str(data)
        self.apply, self._start = self._network(data, data_dir)
        self.evaluate = lab.make_evaluate(self.apply, 250)
        self.shapes = jax.eval_shape(self._start, jax.random.key(0))
        self.example = data.train.x[:1]
        self.layout = jc.trace.layout(self.apply, self.shapes, self.example)
        self._once: dict[Hashable, Any] = {}

    def _loader(self, data_dir: str | None) -> Callable[[int], datasets.Data]:
        config = self.config
        return functools.lru_cache(maxsize=2)(
            lambda seed: datasets.of(config.data, data_dir, config.data_options, seed)
        )

    def _network(self, data: datasets.Data, data_dir: str | None) -> tuple[Callable, Callable]:
        """The function and its start, from a key."""
        models.check(self.config.model, data.kind)
        module = models.build(self.config.model, data.classes, self.config.model_options)
        example = data.test.x[:1]
        return models.apply(module), jax.jit(lambda key: module.init(key, example)["params"])

    def once(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What ``build`` gives, built once."""
        if key not in self._once:
            self._once[key] = build()
        return self._once[key]

    def dense(self, seed: int) -> PyTree:
        """The trained network."""
        return self.once(("dense", seed), lambda: self._trained(seed))

    def _trained(self, seed: int) -> PyTree:
        begin = self._start(jax.random.key(seed))
        pace = optax.cosine_decay_schedule(self.config.learning_rate, max(self.config.steps, 1))
        return self._train(begin, seed, self.config.steps, optax.adam(pace), 1)

    def plan(self, method: Any) -> jc.Plan:
        """All that is compressed, by one method."""
        kept = [(self.config.kept, None)] if self.config.kept else []
        named = jc.plan(self.shapes, [*kept, (self.config.rules, jc.prune.Nonzero())])
        known = {path: x for path, x in self.layout.items() if path in named}
        return jc.plan(self.shapes, [*kept, (self.config.rules, method)], layout=known)

    def compressed(self, method: Any, seed: int) -> Network:
        """The trained network, its kernels by one method. Statistics are of training examples."""
        plan, params = self.plan(method), self.dense(seed)
        needs = [need for method in plan.values() if method is not None for need in method.needs]
        stats = self.stats(seed) if any(need.startswith("stats") for need in needs) else None
        key = jax.random.key(10_000 + seed)
        return Network(quietly(jc.compress, params, plan, stats=stats, key=key))

    def stats(self, seed: int) -> Any:
        x = self.load(seed).train.x
        size = max(self.config.calibration // 8, 1)
        batches = [x[i : i + size] for i in range(0, self.config.calibration, size)]
        plan = self.plan(jc.factorize.WhitenedSVD(rank=1))
        return self.once(("stats", seed), lambda: jc.calibrate(self.apply, self.dense(seed), batches, plan=plan))

    def divergence(self, seed: int) -> Callable[[PyTree], Any]:
        """From the trained network's outputs on training examples, in nats an example: a function of parameters."""
        x = jnp.asarray(self.load(seed).train.x[: min(self.config.calibration, 128)])
        wanted = jax.nn.log_softmax(jax.jit(self.apply)(self.dense(seed), x))

        def moved(params: PyTree) -> Any:
            return (jnp.exp(wanted) * (wanted - jax.nn.log_softmax(self.apply(params, x)))).sum(-1).mean()

        return moved

    def measure(self, seed: int) -> jc.budget.Measure:
        """The error of a compressed kernel: of its outputs, in units of divergence from the trained network."""
        params, stats = self.dense(seed), self.stats(seed)
        typical = quietly(jc.compress, params, self.plan(jc.factorize.WhitenedSVD(rank=0.3)), stats=stats)
        moved = jc.budget.output_error(stats, relative=True)
        return jc.budget.by_loss(self.divergence(seed), params, typical, measure=moved)

    def cut_training(self, params: PyTree, keep: Any) -> Callable[[PyTree, Any], Any] | None:
        """The function for training of a network that keeps these units; None if it is the function itself."""
        return None

    def finetuned(self, network: Network, seed: int) -> Network:
        """All that trains in the tree, trained for as many steps as any way is."""
        steps = self.config.finetuning
        tx = sized(self.config.finetuning_rate, steps)
        return network._replace(tree=self._train(network.tree, seed, steps, tx, 2, network.apply))

    def _train(
        self,
        tree: PyTree,
        seed: int,
        steps: int,
        tx: optax.GradientTransformation,
        order: int,
        apply: Callable | None = None,
    ) -> PyTree:
        if not steps:
            return tree

        fast = any(isinstance(x, jc.formats.FastProduct) for x in jax.tree.leaves(tree, is_leaf=jc.core.is_node))

        def build() -> Any:
            own = apply or self.apply
            # Fast transforms of a batch take less than those of a whole matrix.
            model, seen = (jc.accelerate(own), _nodes_of) if fast else (own, _dense_of)
            return make_step(model, lambda pace: tx, seen)

        step = build() if apply is not None else self.once(("step", order, fast), build)
        train, rest = jc.split(tree)
        state = State(widened(train), tx.init(widened(train)), jnp.zeros((), jnp.int32))
        key = jax.random.fold_in(jax.random.key(seed), order)
        options = {"steps": steps, "batch_size": self.config.batch_size, "key": key, "title": self.config.model}
        held = (dtypes_of(train), rest)
        found = fit(step, state, held, self.load(seed).train, **options)
        return jc.merge(narrowed(found.params, held[0]), rest)

    def score(self, network: Network, seed: int) -> dict[str, float]:
        """How good the network is on validation and test data."""
        data, dense = self.load(seed), jc.materialize(network.tree)
        evaluate = self.evaluate if network.apply is None else lab.make_evaluate(network.apply, 250)
        row: dict[str, float] = {}
        for name in ("val", "test"):
            split = getattr(data, name).take(slice(self.config.test))
            if len(split):
                found = evaluate(dense, split)
                row |= {f"{name}_accuracy": found.accuracy, f"{name}_bits": found.bits}
        return row

    def stored(self, network: Network) -> PyTree:
        """What the file holds."""
        return network.tree

    def size(self, network: Network) -> dict[str, float]:
        """Bytes of the file and multiply-adds of one example, if zeros were skipped and factors applied in turn."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.jc"
            jc.save(path, self.stored(network))
            stored = path.stat().st_size
        cost = jc.trace.cost(network.apply or self.apply, network.tree, self.example)
        return {"bytes": stored, "multiply_adds": cost.total.compressed_multiply_adds}


def sized(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam whose steps go by the root mean square of each array, down to none along a cosine."""
    pace = optax.cosine_decay_schedule(rate, max(steps, 1))
    rms = optax.scale_by_param_block_rms(min_scale=1e-6)
    return optax.chain(optax.scale_by_adam(), rms, optax.scale_by_learning_rate(pace))


def taught(
    student: Callable[[PyTree, Any], Any],
    tree: PyTree,
    teacher: Callable[[Any], Any],
    batches: Iterable[Any],
    tx: optax.GradientTransformation,
    loss: Callable[[Any, Any], Any],
) -> PyTree:
    """The tree, all that trains in it trained towards the outputs of a teacher, one step a batch."""
    train, rest = jc.split(tree)
    train = jax.tree.map(jnp.copy, train)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(train: PyTree, state: Any, x: Any) -> tuple[PyTree, Any]:
        targets = teacher(x)
        grads = jax.grad(lambda train: loss(student(jc.merge(train, rest), x), targets))(train)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state

    state = tx.init(train)
    for x in batches:
        train, state = step(train, state, x)
    return jc.merge(train, rest)


def _dense_of(train: PyTree, held: PyTree, step: jax.Array) -> PyTree:
    return jc.materialize(_nodes_of(train, held, step))


def _nodes_of(train: PyTree, held: PyTree, step: jax.Array) -> PyTree:
    dtypes, rest = held
    return jc.merge(narrowed(train, dtypes), rest)


class Pretrained(Lab):
    """A ResNet that was trained elsewhere; batch statistics are leaves, estimated anew before and after fine-tuning."""

    def _network(self, data: datasets.Data, data_dir: str | None) -> tuple[Callable, Callable]:
        weights, statistics = resnet.load(Path(data_dir or ".") / f"{self.config.model}_cifar10.npz")
        self._params = weights | statistics
        return resnet.with_statistics, lambda key: self._params

    def _trained(self, seed: int) -> PyTree:
        return self._params

    def stats(self, seed: int) -> Any:
        x, size = self.load(seed).train.x[: self.config.calibration], 64
        batches = [resnet.augmented(x[i : i + size], i + seed) for i in range(0, len(x), size)]
        plan = self.plan(jc.factorize.WhitenedSVD(rank=1))
        return self.once(("stats", seed), lambda: jc.calibrate(self.apply, self.dense(seed), batches, plan=plan))

    def measure(self, seed: int) -> jc.budget.Measure:
        """Of outputs alone: what compression does to the loss is mostly undone by new batch statistics."""
        return jc.budget.output_error(self.stats(seed), relative=True)

    def cut_training(self, params: PyTree, keep: Any) -> Callable[[PyTree, Any], Any]:
        weights = {path: x for path, x in params.items() if "/running_" not in path}
        run, _ = jc.shrink(resnet.in_training, weights, keep, self.example)
        return lambda small, x: run({path: small[path] for path in weights}, x)

    def settled(self, network: Network, seed: int) -> Network:
        """The network with statistics of augmented training images."""
        training = network.training or resnet.in_training
        measured = jax.jit(functools.partial(resnet.measured, training))
        measured = self.once("measured", lambda: measured) if network.training is None else measured
        images, params = self.load(seed).train.x[:2000], jc.materialize(network.tree)
        found = [measured(params, resnet.augmented(images[i : i + 250], i)) for i in range(0, len(images), 250)]
        return network._replace(tree={**network.tree, **jax.tree.map(lambda *xs: sum(xs) / len(xs), *found)})

    def finetuned(self, network: Network, seed: int) -> Network:
        """Towards the logits of the trained network, which knows the labels by heart; with statistics of each batch."""
        config, x, dense = self.config, self.load(seed).train.x, self.dense(seed)
        drawn = np.random.default_rng(seed).permutation(len(x))
        size = config.batch_size
        batches = (resnet.augmented(x[drawn[i * size : (i + 1) * size]], i) for i in range(config.finetuning))
        training = network.training or resnet.in_training
        tree = taught(
            lambda tree, x: training(jc.materialize(tree), x),
            network.tree,
            lambda x: self.apply(dense, x),
            batches,
            sized(config.finetuning_rate, config.finetuning),
            lambda found, wanted: jnp.square(found - wanted).mean(),
        )
        return network._replace(tree=tree)

    def score(self, network: Network, seed: int) -> dict[str, float]:
        return super().score(self.settled(network, seed), seed)
