"""The networks whose files are compared: how each is compressed, judged on data held out, and scored on test data."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jcompress as jc
from experiments import data as datasets
from experiments.lab import Lab, batches
from experiments.models import minilm, resnet
from experiments.quantization import recipes, sts

PyTree = Any
Q = jc.quantize
BITS = jc.quantize.Int(bits=8, axis=None)


class Network:
    """One network, as it is before compression.

    Attributes:
      name: in the rows.
      params: what a file holds, a tree of float32 arrays.
      stats: Gram matrices of the kernels, and how often rows of words are read.
      kernels: a pattern for the leaves that take steps by their Gram matrices.
      tables: a pattern for those that are looked up, and have none.
      words: a pattern for tables whose rows take steps by how often each is read.
      score: the unit of what is scored, and its sign: +1 where less is better.
      least: the smallest part of the common step that a leaf takes.
    """

    name: str
    params: PyTree
    stats: Any
    kernels: str
    tables: str | None = None
    words: str | None = None
    layout: Any = None
    score: tuple[str, int] = ("error, %", 1)
    least: float = 0.1

    def divergence(self, params: PyTree) -> Any:
        """How far a network is from the dense one on data that is neither test nor calibration; may be traced."""
        raise NotImplementedError

    def judged(self, params: PyTree) -> float:
        """The score on test data."""
        raise NotImplementedError

    def rules(self, step: Any, price: Any, states: int, parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Kernels and tables in these steps, each times its own part of them; all else in 8 bits."""
        found: list[tuple[str, Any]] = [(p, self._method(p, step * part, price, states)) for p, part in parts.items()]
        return [*found, (".*", BITS)]

    def _method(self, path: str, step: Any, price: Any, states: int) -> Any:
        if self.words is not None and re.fullmatch(self.words, path):
            return Q.WaterFilling(step, price, states, damping=0.1, weigh="counts")
        if self.tables is not None and re.fullmatch(self.tables, path):
            w = dict(jc.paths(self.params))[path]
            size = jnp.sqrt(jnp.mean(jnp.square(w)))
            return Q.Dependent(price, Q.Int(8, axis=None, clip=Q.ranges.Fixed(None, 127 * step * size)), states or 4)
        return Q.WaterFilling(step, price, states)

    def leaves(self) -> dict[str, int]:
        """Numbers of each leaf that has a step of its own, those that are not zero."""
        several = "|".join(x for x in (self.kernels, self.tables, self.words) if x is not None)
        return {path: np.count_nonzero(x) for path, x in jc.paths(self.params) if re.fullmatch(several, path)}

    def compressed(self, step: float, price: float, states: int, parts: Mapping[str, Any]) -> PyTree:
        """The tree, compiled once for all steps and prices."""
        compiled = self._compiled(states)
        return compiled(self.params, self.stats, jnp.float32(step), jnp.float32(price), dict(parts))

    @functools.lru_cache(maxsize=4)  # noqa: B019  # networks live as long as the command
    def _compiled(self, states: int) -> Callable[..., PyTree]:
        def compress(params: PyTree, stats: Any, step: Any, price: Any, parts: dict[str, Any]) -> PyTree:
            plan = jc.plan(self.params, self.rules(step, price, states, parts), layout=self.layout)
            return jc.compress(params, plan, stats=stats)

        return jax.jit(compress)


class Pruned(Network):
    """A pruned LeNet-300-100 from a file; judged by cross entropy on the last 5,000 training images."""

    kernels = ".*/kernel"

    def __init__(self, path: Path, data_dir: str) -> None:
        self.lab = Lab("lenet_300_100", lambda seed: datasets.load("mnist", data_dir, val=5000 / 60000))
        self.params = jax.tree.map(np.asarray, jc.materialize(jc.load(path)))
        kept = [(np.count_nonzero(x), x.size) for x in jax.tree.leaves(self.params)]
        self.name = f"LeNet-300-100 at {sum(n for n, _ in kept) / sum(n for _, n in kept):.0%}"
        self.data = self.lab.load(0)
        kernels = jc.plan(self.params, [(self.kernels, Q.WaterFilling()), (".*", None)])
        images = [self.data.train.x[i : i + 500] for i in range(0, 5000, 500)]
        self.stats = jc.calibrate(self.lab.apply, self.params, images, kernels)

    def divergence(self, params: PyTree) -> Any:
        return self.lab.loss(params, self.data.val.x, self.data.val.y)

    def judged(self, params: PyTree) -> float:
        return 100 * (1 - self.lab.evaluate(params, self.data.test).accuracy)


class ResNet(Network):
    """ResNet-20 or 56, its batch norms in the kernels and biases; judged by the divergence on training images."""

    kernels = ".*conv.*/weight|linear/weight"

    def __init__(self, path: Path, data_dir: str, calibration: int = 1000, held: int = 1000) -> None:
        self.name = path.stem.replace("resnet", "ResNet-").removesuffix("_cifar10")
        params, statistics = resnet.load(path)
        self.params, self._rest = folded(params, statistics)
        data = datasets.load("cifar10", data_dir)
        self.test, self.seen, self.train = data.test, data.train.x[:held], data.train.x[held:]
        self.layout = jc.trace.layout(self.apply, self.params, self.seen[:1])
        images = [resnet.augmented(data.train.x[i : i + 100], i) for i in range(held, held + calibration, 100)]
        plan = jc.plan(self.params, [(self.kernels, Q.WaterFilling()), (".*", None)], layout=self.layout)
        self.stats = jc.calibrate(self.apply, self.params, images, plan)
        self._logits = jax.jit(self.apply)
        self.wanted = jax.nn.log_softmax(self._logits(self.params, self.seen))

    def apply(self, params: Any, x: Any) -> Any:
        ones, statistics = self._rest
        return resnet.logits({**params, **ones}, x, statistics)

    def divergence(self, params: PyTree) -> Any:
        found = jax.nn.log_softmax(self.apply(params, self.seen))
        return (jnp.exp(self.wanted) * (self.wanted - found)).sum(-1).mean()

    def tuned(self, tree: PyTree, steps: int, seed: int = 0) -> PyTree:
        """The tree with what is no kernel trained towards the dense network's outputs for so many steps."""
        dense = jc.materialize(tree)
        held = {path: x for path, x in dense.items() if re.fullmatch(self.kernels, path)}
        train = {path: x for path, x in dense.items() if path not in held}
        tx = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

        @jax.jit
        def step(train: PyTree, state: Any, x: Any, targets: Any) -> tuple[PyTree, Any]:
            def loss(train: PyTree) -> Any:
                return jc.distill.soft_targets(self.apply({**held, **train}, x), targets, temperature=1.0)

            updates, state = tx.update(jax.grad(loss)(train), state)
            return optax.apply_updates(train, updates), state

        state, order = tx.init(train), batches(jax.random.key(seed), len(self.train), 100)
        for number, index in zip(range(steps), order, strict=False):
            x = resnet.augmented(self.train[index], number)
            train, state = step(train, state, x, self._logits(self.params, x))
        return {**tree, **jc.compress(train, jc.plan(train, [(".*", BITS)]))}

    def judged(self, params: PyTree) -> float:
        found = [
            np.asarray(self._logits(params, self.test.x[i : i + 250])).argmax(-1) for i in range(0, len(self.test), 250)
        ]
        return 100 * float(np.mean(np.concatenate(found) != self.test.y))


def folded(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> tuple[PyTree, tuple[PyTree, PyTree]]:
    """Kernels and biases with the batch norms in them; and the scales of 1 and the statistics that this leaves."""
    found, ones, rest = dict(params), {}, {}
    for name in [x.removesuffix("/weight") for x in params if "bn" in x and x.endswith("/weight")]:
        mean, var = statistics[f"{name}/running_mean"], statistics[f"{name}/running_var"]
        scale, kernel = params[f"{name}/weight"] * jax.lax.rsqrt(var + 1e-5), name.replace("bn", "conv") + "/weight"
        found[kernel] = params[kernel] * scale[:, None, None, None]
        found[f"{name}/bias"] = params[f"{name}/bias"] - mean * scale
        ones[f"{name}/weight"] = jnp.ones_like(found.pop(f"{name}/weight"))
        rest |= {f"{name}/running_mean": jnp.zeros_like(mean), f"{name}/running_var": jnp.full_like(var, 1 - 1e-5)}
    return found, (ones, rest)


class Encoder(Network):
    """all-MiniLM-L6-v2; judged by the cosine to its own embeddings of sentences that nobody judged."""

    name, kernels, score = "MiniLM", recipes.KERNELS, ("Spearman", -1)
    tables, words = "embeddings/position/embedding", "embeddings/token/embedding"

    def __init__(self, model_dir: str, data_dir: str) -> None:
        self.encoder, self.params = minilm.load(model_dir)
        files = {name: Path(data_dir) / f"sts2015_{name}.tsv" for name in ("images", "headlines")}
        sets = {name: sts.read(path, self.encoder) for name, path in files.items()}
        self.labelled, free = sts.labelled(sets), sts.unlabelled(sets)
        tokens = [*free.first, *free.second]
        self.judge = sts.Judge(self.encoder)
        self.stats = recipes.Calibration(self.encoder, self.params, tokens[600:], 768, 24).stats(["stats.gram"])
        lines = (Path(data_dir) / "sentences.txt").read_text(encoding="utf-8").splitlines()
        self.stats = self.stats.merge(recipes.words_read(self.params, self.encoder.tokens(lines)))
        short = [x for x in tokens[:600] if len(x) <= 24][:128]
        self.seen = minilm.pad(short, 24)
        self.wanted = jax.jit(self.encoder)(self.params, *self.seen)

    def divergence(self, params: PyTree) -> Any:
        return 1 - (self.encoder(params, *self.seen) * self.wanted).sum(-1).mean()

    def judged(self, params: PyTree) -> float:
        scores = [sts.spearman(self.judge.pairs(params, pairs), pairs.scores) for pairs in self.labelled.values()]
        return float(np.mean(scores))


def shares(network: Network, divergence: Callable[[PyTree], Any], step: float = 0.5) -> dict[str, float]:
    """What part of the common step each leaf takes, so that all add alike to the divergence, by number of weights.

    The divergence of a leaf compressed alone grows with the square of its step: of all steps that give the same sum,
    those whose parts go as their numbers of weights take the fewest bits.
    """
    sizes = network.leaves()
    tree = jc.materialize(network.compressed(step, 0.0, 0, dict.fromkeys(sizes, 1.0)))
    dense, small = dict(jc.paths(network.params)), dict(jc.paths(tree))
    start, treedef = float(divergence(network.params)), jax.tree.structure(network.params)
    alone = {}
    for path in sizes:
        leaves = [small[p] if p == path else x for p, x in dense.items()]
        alone[path] = max(float(divergence(jax.tree.unflatten(treedef, leaves))) - start, 1e-9)
    worth = {path: np.log(sizes[path] / alone[path]) / 2 for path in sizes}
    mean = sum(sizes[path] * worth[path] for path in sizes) / sum(sizes.values())
    return {path: float(np.clip(np.exp(worth[path] - mean), network.least, 3.0)) for path in sizes}


def named(names: Sequence[str], args: Any) -> list[Network]:
    """The networks of these names."""
    made: dict[str, Callable[[], Network]] = {
        "lenet": lambda: Pruned(Path(args.pruned), args.data_dir),
        "resnet20": lambda: ResNet(Path(args.data_dir) / "resnet20_cifar10.npz", args.data_dir),
        "resnet56": lambda: ResNet(Path(args.data_dir) / "resnet56_cifar10.npz", args.data_dir),
        "minilm": lambda: Encoder(args.model_dir, args.data_dir),
    }
    if unknown := [name for name in names if name not in made]:
        raise ValueError(f"--networks: {unknown[0]!r} is unknown; use some of {','.join(made)}")
    return [made[name]() for name in names]
