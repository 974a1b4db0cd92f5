"""Losses of distillation by name, and the school that trains a student by each of them for equally many steps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from experiments import lab as labs
from experiments import pictures, tables
from experiments.families import __main__ as families
from experiments.families import ways
from experiments.families.lab import Config as Network
from experiments.workdir import Row, Rows, write

PyTree = Any
D = jc.distill


@dataclasses.dataclass(frozen=True)
class Config:
    """Fork it, or change a value with ``--config.<name>=<value>``."""

    name: str = "digits"
    data: str = "digits"
    network: Network = dataclasses.field(default_factory=Network)  # the teacher, and its data
    hidden: str = r"dense_\d/kernel"  # whose products, biases added, are the features
    share: float = 0.04  # of the teacher's multiply-adds, that the student has
    seeds: int = 3
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    student: str = ""  # a network that was trained elsewhere, instead of the teacher cut
    only: str = ""  # some of the losses, joined by commas


def config_of(data: str) -> Config:
    """Those of the digits are the defaults; teachers are those of the comparison of families."""
    if data == "digits":
        return Config()
    network = families.config_of(data)
    if data == "text":
        return Config("text", data, network, hidden=r"block_\d/up/kernel", share=0.3, steps=400, batch_size=32)
    if data == "cifar10":
        teacher = dataclasses.replace(network, model="resnet56")
        return Config(data, data, teacher, hidden="", share=0.33, steps=60, learning_rate=1e-3)
    return Config(data, data, network, share=0.1, steps=3000, batch_size=100)


class Seen(NamedTuple):
    """What a loss may read: logits and features of both, in batches, and what is learned beside the student."""

    student: Any
    teacher: Any
    layers: dict[str, Any]
    goals: dict[str, Any]
    learned: Any
    y: Any
    key: Any


def last(layers: dict[str, Any]) -> Any:
    """The last layer's features, flat."""
    found = list(layers.values())[-1]
    return found.reshape(len(found), -1)


def fired(layers: dict[str, Any]) -> dict[str, Any]:
    """Features after the activation function."""
    return jax.tree.map(jax.nn.relu, layers)


def mapped(s: Seen) -> dict[str, Any]:
    """The student's features in the shapes of the teacher's."""
    return jax.tree.map(lambda f, x: f(x), s.learned["maps"], fired(s.layers), is_leaf=callable)


def in_pairs(layers: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The first and the last layer of a stage, stage by stage."""
    found = list(layers.values())
    return list(zip(found[::2], found[1::2], strict=True))


LOSSES: dict[str, Callable[[Seen], Any]] = {
    "plain": lambda s: 0.0,
    "permuted targets": lambda s: D.permuted_targets(s.student, s.teacher, key=s.key),
    "soft targets": lambda s: D.soft_targets(s.student, s.teacher, temperature=4.0),
    "logits": lambda s: D.logit_matching(s.student, s.teacher),
    "noisy logits": lambda s: D.logit_matching(s.student, D.noisy_logits(s.teacher, 0.2, key=s.key)),
    "confidence": lambda s: D.confidence_weighted(s.student, s.teacher, s.y),
    "hints": lambda s: D.hints(fired(s.layers), fired(s.goals), s.learned["maps"]),
    "boundaries": lambda s: D.activation_boundaries(s.layers, s.goals, regressor=s.learned["maps"]),
    "selectivity": lambda s: D.neuron_selectivity(fired(s.layers), fired(s.goals)),
    "attention": lambda s: D.attention_transfer(fired(s.layers), fired(s.goals)),
    "flow": lambda s: D.fsp(in_pairs(mapped(s)), in_pairs(fired(s.goals))),
    "similarities": lambda s: D.similarity_preserving(fired(s.layers), fired(s.goals)),
    "distances": lambda s: D.relational_distance(last(fired(s.layers)), last(fired(s.goals))),
    "angles": lambda s: D.relational_angle(last(fired(s.layers))[:32], last(fired(s.goals))[:32]),
    "correlations": lambda s: D.correlation_congruence(last(fired(s.layers)), last(fired(s.goals))),
    "information": lambda s: D.variational_information(
        fired(s.layers), fired(s.goals), s.learned["scales"], s.learned["maps"]
    ),
    "contrast": lambda s: D.contrastive(last(mapped(s)), last(fired(s.goals))),
}
"""By name, a number of what is seen of a batch."""

UNFIT = {"cifar10": (), "text": ("angles", "attention", "flow")}
"""Losses that features are too large for, or have no stages for. Those of dense layers have no positions."""


class Schools:
    """All losses and seeds of one config, as the runner takes them."""

    keys = ("seed", "loss")

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None) -> None:
        unfit = UNFIT.get(config.data, ("selectivity", "attention", "flow"))
        known = [name for name in LOSSES if name not in unfit]
        unknown = set(filter(None, config.only.split(","))) - set(known)
        if unknown:
            raise ValueError(f"config.only: {sorted(unknown)} unknown; use some of {', '.join(known)}")
        self.losses = [x for x in known if not config.only or x in config.only.split(",")]
        self.config, self.workdir = config, Path(workdir or f"runs/distillation/{config.name}")
        self.lab = families.lab_of(config.network, data_dir)
        setting = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("name", "only", "seeds")}
        self.setting = {"config": setting, "checksum": self.lab.load(0).checksum()}

    def todo(self) -> Iterator[Row]:
        for seed in range(self.config.seeds):
            yield {"seed": seed, "loss": "teacher"}
            yield {"seed": seed, "loss": "cut"}
            yield from ({"seed": seed, "loss": name} for name in self.losses)

    def measure(self, rows: Rows, seed: int, loss: str) -> Row:
        teacher = self.lab.dense(seed)
        if loss == "teacher":
            return self.lab.score(ways.Network(teacher), seed) | self.lab.size(ways.Network(teacher))
        network = self.lab.once(("student", seed), lambda: self.student(seed))
        if loss != "cut":
            network = network._replace(tree=self._taught(network, teacher, seed, loss))
        return self.lab.score(network, seed) | self.lab.size(network)

    def student(self, seed: int) -> ways.Network:
        """The network that learns, as it begins."""
        return ways.units(self.lab, seed, self.config.share, "group")

    def shown(self, x: Any, number: int) -> Any:
        """A batch of so many steps as both networks see it."""
        return x

    def layers(self, apply: Callable, params: PyTree, x: Any) -> tuple[Any, dict[str, Any]]:
        """Logits, and what the hidden layers give before their activation functions."""
        logits, found = jc.trace.features(apply, params, x, match=self.config.hidden)
        leaves = dict(jc.paths(params))
        biases = {path: leaves.get(path.replace("kernel", "bias"), 0.0) for path in found}
        return logits, {path: y + biases[path] for path, y in found.items()}

    def _taught(self, network: ways.Network, teacher: PyTree, seed: int, name: str) -> PyTree:
        config, lab, term = self.config, self.lab, LOSSES[name]
        apply = network.training or network.apply or lab.apply
        data, key = lab.load(seed).train, jax.random.key(1000 + seed)
        few, labels = self.shown(data.x[: config.batch_size], 0), data.y[: config.batch_size]
        shapes = [jax.eval_shape(lambda p, x, f=f: self.layers(f, p, x)[1], p, few)
                  for f, p in ((apply, network.tree), (lab.apply, teacher))]  # fmt: skip
        scales = jax.tree.map(lambda x: jnp.zeros(x.shape[-1]), shapes[1])
        begin = {"student": network.tree, "maps": D.regressors(*shapes, key=key), "scales": scales}

        def hard(train: PyTree, x: Any, y: Any) -> Any:
            return labs.cross_entropy(apply(train["student"], x), y).mean()

        def soft(train: PyTree, answers: Any, x: Any, y: Any, key: Any) -> Any:
            logits, layers = self.layers(apply, train["student"], x)
            return term(Seen(logits, answers[0], layers, answers[1], train, y, key)) + 0.0 * logits.sum()

        told = lab.once("answers", lambda: jax.jit(functools.partial(self.layers, lab.apply)))
        sizes = [optax.tree.norm(jax.jit(jax.grad(f))(*args)["student"])
                 for f, args in ((hard, (begin, few, labels)),
                                 (soft, (begin, told(teacher, few), few, labels, key)))]  # fmt: skip
        weight = float(jnp.where(sizes[1] > 0, sizes[0] / sizes[1], 0.0))
        tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(train: PyTree, state: Any, answers: Any, x: Any, y: Any, key: Any) -> tuple:
            def total(train: PyTree) -> Any:
                return hard(train, x, y) + weight * soft(train, answers, x, y, key)

            updates, state = tx.update(jax.grad(total)(train), state)
            return optax.apply_updates(train, updates), state

        train, batches = jax.tree.map(jnp.copy, begin), labs.batches(key, len(data), config.batch_size)
        state = tx.init(train)
        for number in range(config.steps):
            chosen = next(batches)
            x, now = self.shown(data.x[chosen], number), jax.random.fold_in(key, number)
            answers = self.remembered((seed, number), lambda x=x: told(teacher, x))
            train, state = step(train, state, answers, x, data.y[chosen], now)
        return train["student"]

    def remembered(self, key: tuple[int, int], ask: Callable[[], Any]) -> Any:
        """The teacher's answers of a step of a seed."""
        return ask()

    def line(self, row: Row) -> str:
        return f"seed {row['seed']} {row['loss']}: {families.score(row, self.lab.kind):.3f}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        places = self.workdir / "table.md", self.workdir / "losses.png"
        return finish(rows, self.lab.kind, *places), None


def finish(rows: Sequence[Row], kind: str, table: Path, picture: Path) -> str:
    """Write the table and the picture; return the table."""
    digits, unit = (3, "bits per byte") if kind == "text" else (2, "test error, %")
    shown, bars = [["trained by", unit, "multiply-adds"]], []
    for name in dict.fromkeys(row["loss"] for row in rows):
        own = [row for row in rows if row["loss"] == name]
        found = tables.mean_std([families.score(row, kind) for row in own])
        told = {"teacher": "the teacher itself", "cut": "nothing: the student as it begins"}.get(name, name)
        shown.append([told, tables.spread(*found, digits), f"{own[0]['multiply_adds']:,.0f}"])
        if name != "cut":
            bars.append((name, *found[:2]))
    text = tables.markdown(shown, (0,))
    write(table, text + "\n")
    pictures.bars(bars, unit, picture)
    return text
