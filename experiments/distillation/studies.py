"""Four uses of distillation, each beside its control: born-again networks, mean teachers, no data, ten images.

Examples:
  python -m experiments.distillation.studies
  python -m experiments.distillation.studies --config.data=mnist --data_dir=<folder with MNIST's idx files>

Nothing is tuned: settings are the papers' where they carry over, else round numbers, and all rows of a study take the
same steps. Interrupted, the same command continues. What the papers lead one to expect stands beside each study in the
table (:data:`PUBLISHED`, as remembered from them).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jcompress as jc
from experiments import data as datasets
from experiments import lab as labs
from experiments import models, runner, tables
from experiments.workdir import Row, Rows, write

PyTree = Any
D = jc.distill


@dataclasses.dataclass(frozen=True)
class Config:
    """Fork it, or change a value with ``--config.<name>=<value>``."""

    name: str = "digits"
    data: str = "digits"
    data_options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"val": 0.2, "test": 0.2})
    seeds: int = 3
    steps: int = 500  # of every training
    batch_size: int = 64
    learning_rate: float = 2e-3  # of Adam, falling as a cosine
    examples: int = 500  # that born-again networks see
    generations: int = 3
    labelled: int = 50  # the others have no label, for the mean teacher
    consistency: float = 100.0  # its weight at its height
    decay: float = 0.99  # of its average
    made: int = 1000  # images made without data
    making: int = 200  # steps of each batch of 250 of them
    distilled: int = 300  # steps in which the images of the last study are learned
    inner: int = 10  # steps that a network is trained on them
    only: str = ""  # some of the studies, joined by commas


def config_of(data: str) -> Config:
    """Those of the digits are the defaults."""
    if data == "digits":
        return Config()
    if data != "mnist":
        raise LookupError(data)
    larger = {"steps": 2000, "examples": 5000, "labelled": 100, "made": 2500, "distilled": 600}
    return Config("mnist", "mnist", {"val": 1 / 12}, batch_size=100, **larger)  # type: ignore[arg-type]


PUBLISHED = {
    "born again": "CIFAR-100, DenseNet-112-33: 18.25 first, 16.95 born again, three averaged better still "
    "(Furlanello et al. 2018, arXiv:1805.04770)",
    "mean teacher": "SVHN, 1,000 labels: 12.3 by labels alone, 3.95 (Tarvainen & Valpola 2017, arXiv:1703.01780)",
    "no data": "MNIST, LeNet-5 to half of it: 7.5 to 14 by statistics of all layers, 0.9 with data (Lopes et al. 2017, "
    "arXiv:1710.07535); 1.8 by a generator (Chen et al. 2019, arXiv:1904.01186)",
    "ten images": "MNIST, LeNet, ten images: 6.2 from a known start, 20.5 from any; real images 31.6 "
    "(Wang et al. 2018, arXiv:1811.10959)",
}


class Class:
    """One seed: its data, and networks trained by any loss in equally many steps."""

    def __init__(self, config: Config, data: datasets.Data, seed: int) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.key = jax.random.key(seed)
        self.train = data.train

    def network(self, name: str, number: int = 0, **options: Any) -> tuple[Callable, PyTree]:
        """A function, and parameters that it begins with."""
        module = models.build(name, self.data.classes, options)
        start = jax.jit(module.init)(jax.random.fold_in(self.key, number), self.data.test.x[:1])["params"]
        return models.apply(module), start

    def fit(
        self,
        params: PyTree,
        loss: Callable[[PyTree, PyTree, Any, jax.Array, jax.Array], jax.Array],
        examples: Sequence[np.ndarray],
        decay: float = 0.0,
    ) -> tuple[PyTree, PyTree]:
        """Parameters after training, and their average: ``loss(params, average, batch, key, progress)``."""
        config = self.config
        pace = optax.cosine_decay_schedule(config.learning_rate, config.steps)
        tx = optax.chain(optax.adam(pace), D.mean_teacher(decay))

        @jax.jit
        def step(params: PyTree, state: Any, batch: Any, key: jax.Array, progress: jax.Array) -> tuple:
            grads = jax.grad(loss)(params, D.teacher_params(params, state), batch, key, progress)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        orders = [labs.batches(jax.random.fold_in(self.key, 7 + i), len(x[0]), config.batch_size)
                  for i, x in enumerate(examples)]  # fmt: skip
        for number in range(config.steps):
            batch = [tuple(a[rows] for a in x) for x, rows in zip(examples, map(next, orders), strict=True)]
            progress = jnp.float32(number / config.steps)
            params, state = step(params, state, batch, jax.random.fold_in(self.key, number), progress)
        return params, D.teacher_params(params, state)

    def error(self, apply: Callable, *networks: PyTree) -> float:
        """Test error in percent, of the mean of the distributions of several."""
        right, test = 0, self.data.test
        mean = jax.jit(lambda x: sum(jax.nn.softmax(apply(p, x)) for p in networks))
        for i in range(0, len(test), 500):
            right += int((np.asarray(mean(test.x[i : i + 500])).argmax(-1) == test.y[i : i + 500]).sum())
        return 100 * (1 - right / len(test))


def born_again(c: Class) -> dict[str, float]:
    """Equal networks, each taught by the one before, with labels too; beside as many that are not taught."""
    few = c.train.take(slice(c.config.examples))
    count = c.config.generations
    apply, starts = c.network("lenet_300_100")[0], [c.network("lenet_300_100", i)[1] for i in range(count + 1)]

    def plain(params: PyTree, _: PyTree, batch: Any, key: jax.Array, progress: jax.Array) -> jax.Array:
        ((x, y),) = batch
        return labs.cross_entropy(apply(params, x), y).mean()

    def again(begin: PyTree, teacher: PyTree) -> PyTree:
        def loss(params: PyTree, _: PyTree, batch: Any, key: jax.Array, progress: jax.Array) -> jax.Array:
            ((x, y),) = batch
            logits = apply(params, x)
            return labs.cross_entropy(logits, y).mean() + D.soft_targets(logits, apply(teacher, x))

        return c.fit(begin, loss, [(few.x, few.y)])[0]

    alone = [c.fit(p, plain, [(few.x, few.y)])[0] for p in starts]
    taught = D.generations(again, alone[0], starts[1:])
    found = {"plain": c.error(apply, alone[1])}
    found |= {f"generation {i}": c.error(apply, p) for i, p in enumerate(taught, 1)}
    found |= {f"{count} plain, averaged": c.error(apply, *alone[1:])}
    return found | {f"{count} generations, averaged": c.error(apply, *taught)}


def shifted(x: jax.Array, key: jax.Array) -> jax.Array:
    """Images moved by up to a fourteenth of their width, with noise."""
    far = max(x.shape[1] // 14, 1)
    moves = jax.random.randint(key, (len(x), 2), -far, far + 1)
    moved = jax.vmap(lambda image, move: jnp.roll(image, move, (0, 1)))(x, moves)
    return moved + 0.1 * jax.random.normal(key, x.shape)


def mean_teacher(c: Class) -> dict[str, float]:
    """Few labels, all images: a student that is to say of an image, moved twice, what the teacher says."""
    order = np.random.default_rng(c.seed).permutation(len(c.train))
    few = c.train.take(order[: c.config.labelled])
    apply, begin = c.network("lenet_300_100")

    def trained(weight: float, own: bool = False) -> tuple[PyTree, PyTree]:
        def loss(params: PyTree, average: PyTree, batch: Any, key: jax.Array, progress: jax.Array) -> jax.Array:
            (x, y), (more,) = batch
            first, second, third = jax.random.split(key, 3)
            hard = labs.cross_entropy(apply(params, shifted(x, first)), y).mean()
            if not weight:
                return hard
            theirs = apply(params if own else average, shifted(more, third))
            grown = jnp.exp(-5 * (1 - jnp.minimum(progress / 0.4, 1)) ** 2)  # the paper's
            return hard + weight * grown * D.probability_errors(apply(params, shifted(more, second)), theirs)

        return c.fit(begin, loss, [(few.x, few.y), (c.train.x,)], c.config.decay)

    alone, theirs = trained(0.0), trained(c.config.consistency)
    return {
        "labels alone": c.error(apply, alone[0]),
        "labels alone, weights averaged": c.error(apply, alone[1]),
        "its own answers": c.error(apply, trained(c.config.consistency, own=True)[0]),
        "mean teacher": c.error(apply, theirs[1]),
    }


def no_data(c: Class) -> dict[str, float]:
    """A student of half the width on images that were made from the teacher and stored moments of its layers."""
    apply, begin = c.network("cnn", width=16)
    small, start = c.network("cnn", 1, width=8)

    def plain(params: PyTree, _: PyTree, batch: Any, key: jax.Array, progress: jax.Array) -> jax.Array:
        ((x, y),) = batch
        return labs.cross_entropy(apply(params, x), y).mean()

    teacher = c.fit(begin, plain, [(c.train.x, c.train.y)])[0]

    def taught(images: np.ndarray) -> float:
        def loss(params: PyTree, _: PyTree, batch: Any, key: jax.Array, progress: jax.Array) -> jax.Array:
            (x,) = batch[0]
            return D.soft_targets(small(params, x), apply(teacher, x), temperature=4.0)

        return c.error(small, c.fit(start, loss, [(images,)])[0])

    real, size = c.train.x[: c.config.made], c.config.made
    noise = np.asarray(jax.random.uniform(c.key, (size, *real.shape[1:])))
    return {
        "the teacher": c.error(apply, teacher),
        "real images": taught(real),
        "made by moments of all layers": taught(made(c, apply, teacher, "all")),
        "made by those of the last layer": taught(made(c, apply, teacher, "last")),
        "noise": taught(noise),
    }


def made(c: Class, apply: Callable, teacher: PyTree, layers: str) -> np.ndarray:
    """Images in [0, 1] on which layers have the moments that were stored, and classes are sure and equally frequent."""
    match = ".*kernel" if layers == "all" else "head/kernel"
    stored = D.moments_of(jc.trace.features(apply, teacher, c.train.x[:2000], match=match)[1])

    def loss(z: jax.Array) -> jax.Array:
        logits, found = jc.trace.features(apply, teacher, jax.nn.sigmoid(z), match=match)
        return D.moment_errors(found, stored) + D.generator_prior(logits, activation=0.0)

    size, images = min(250, c.config.made), []
    for i in range(c.config.made // size):
        begin = jax.random.normal(jax.random.fold_in(c.key, 500 + i), (size, *c.train.x.shape[1:])) - 1.0
        images.append(D.synthesize(loss, begin, optax.adam(0.1), c.config.making)[0])
    return np.asarray(jax.nn.sigmoid(jnp.concatenate(images)))


def ten_images(c: Class) -> dict[str, float]:
    """One image a class, learned so that a few steps on them train a network; beside real ones, rates learned alike."""
    classes = c.data.classes
    network = c.network("cnn")[0]
    first = [int(np.flatnonzero(c.train.y == label)[c.seed]) for label in range(classes)]
    real, labels = jnp.asarray(c.train.x[np.array(first)]), jnp.arange(classes)

    def loss(params: PyTree, data: Any) -> jax.Array:
        return labs.cross_entropy(network(params, data[0]), data[1]).mean()

    def start(number: jax.Array) -> PyTree:
        module = models.build("cnn", classes, {})
        return module.init(jax.random.fold_in(c.key, number), c.data.test.x[:1])["params"]

    def tested(found: Any, number: int) -> float:
        begin = jax.jit(start)(number)
        return c.error(network, jax.jit(D.after_steps, static_argnums=0)(loss, begin, (found[0], labels), found[1]))

    def learned(images: bool, known: bool) -> float:
        tx = optax.multi_transform({"x": optax.adam(0.02 if images else 0.0), "rates": optax.adam(0.002)},
                                   ("x", "rates"))  # fmt: skip

        @jax.jit
        def step(found: Any, state: Any, number: jax.Array, batch: Any) -> tuple:
            begin = start(jnp.int32(0) if known else number)
            of = lambda f: D.dataset_distillation(loss, begin, (f[0], labels), batch, f[1])  # noqa: E731
            grads = jax.grad(of)(found)
            norm = optax.tree.norm(grads)
            grads = jax.tree.map(lambda g: jnp.where(norm > 1, g / norm, g), grads)
            updates, state = tx.update(grads, state, found)
            return optax.apply_updates(found, updates), state

        found = (real, jnp.full(c.config.inner, 0.02))
        state, batches = tx.init(found), labs.batches(c.key, len(c.train), 250)
        for number in range(c.config.distilled):
            rows = next(batches)
            found, state = step(found, state, jnp.int32(1000 + number), (c.train.x[rows], c.train.y[rows]))
        others = (0,) if known else (1, 2, 3)  # starts that were not seen
        return float(np.mean([tested(found, number) for number in others]))

    return {
        "real images, known start": learned(False, True),
        "learned, known start": learned(True, True),
        "real images, any start": learned(False, False),
        "learned, any start": learned(True, False),
    }


STUDIES: dict[str, Callable[[Class], dict[str, float]]] = {
    "born again": born_again,
    "mean teacher": mean_teacher,
    "no data": no_data,
    "ten images": ten_images,
}


class Studies:
    """All studies and seeds of one config, as the runner takes them."""

    keys = ("seed", "study")

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None) -> None:
        unknown = set(filter(None, config.only.split(","))) - set(STUDIES)
        if unknown:
            raise ValueError(f"config.only: {sorted(unknown)} unknown; use some of {', '.join(STUDIES)}")
        self.config, self.workdir = config, Path(workdir or f"runs/distillation/studies_{config.name}")
        self.data = [datasets.of(config.data, data_dir, config.data_options, seed) for seed in range(config.seeds)]
        setting = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("name", "only", "seeds")}
        self.setting = {"config": setting, "checksum": self.data[0].checksum()}

    def todo(self) -> Iterator[Row]:
        for study in STUDIES:
            if not self.config.only or study in self.config.only.split(","):
                yield from ({"seed": seed, "study": study} for seed in range(self.config.seeds))

    def measure(self, rows: Rows, seed: int, study: str) -> Row:
        return {"errors": STUDIES[study](Class(self.config, self.data[seed], seed))}

    def line(self, row: Row) -> str:
        return f"{row['study']}, seed {row['seed']}: " + ", ".join(f"{k} {v:.2f}" for k, v in row["errors"].items())

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return finish(rows, self.workdir / "table.md"), None


def finish(rows: Sequence[Row], table: Path) -> str:
    """Write the table; return it."""
    shown = [["study", "network", "test error, %", "published"]]
    for study in dict.fromkeys(row["study"] for row in rows):
        own = [row["errors"] for row in rows if row["study"] == study]
        for i, name in enumerate(own[0]):
            spread = tables.spread(*tables.mean_std([errors[name] for errors in own]))
            shown.append([study, name, spread, "" if i else PUBLISHED[study]])
    text = tables.markdown(shown, (0, 1, 3))
    write(table, text + "\n")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    return runner.of_config(__doc__, "runs/distillation/studies_<name of the config>", config_of, Studies, argv)


if __name__ == "__main__":
    sys.exit(main())
