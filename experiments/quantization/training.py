"""Networks trained in 4, 3, 2 and 1 bits and in three values, from one dense network each, with equal steps.

    python -m experiments.quantization.training --data_dir=<folder with MNIST's idx files and tinyshakespeare.txt>

Nothing is chosen by the test split: the learning rate of a way is that of the two which validates better with the first
seed. It writes ``results.jsonl``, ``table.md``, ``curve.png`` and ``record.json`` to ``--workdir``. Interrupted, the
same command continues.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

import jcompress as jc
from experiments import data as datasets
from experiments import flags, pictures, runner, tables
from experiments.lab import Lab, batches
from experiments.runner import Way, describe
from experiments.workdir import Row, Rows, write
from jcompress.formats import FakeQuantized, Frozen

PyTree = Any
T, Int = jc.quantize.training, jc.quantize.Int


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, a model, and the budget: ``dense`` steps for the network that all ways start from, then ``steps``."""

    data: str
    model: str
    pattern: str
    dense: int
    steps: int
    batch_size: int
    data_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Train = Literal["dense", "nodes", "fixed", "simulate", "none"]


def trained(name: str, method: Any = None, train: Train = "nodes") -> Way:
    """A method, and how weights train under it.

    ``"nodes"``: what is trainable in the nodes that ``compress`` gives; ``"fixed"``: likewise, but for the scales;
    ``"simulate"``: dense weights, compressed anew at each step; ``"none"``: not at all.
    """

    def make(bench: Bench, seed: int, rate: float) -> PyTree:
        return bench.train(name, method, train, bench.dense(seed), seed, rate)

    return Way(name, make, told=lambda bench: [describe(method), train], family=name.split(",")[0])


def uniform(bits: int) -> list[Way]:
    """The ways to train weights of so many bits."""
    lsq = T.LSQ(bits=bits, start="deviation")
    return [
        trained(f"{bits} bits, rounded", Int(bits=bits, clip="mse"), "none"),
        trained(f"{bits} bits, straight-through, fixed range", lsq, "fixed"),
        trained(f"{bits} bits, straight-through, range of each step", Int(bits=bits), "simulate"),
        trained(f"{bits} bits, LSQ", lsq),
    ]


WAYS = [
    trained("dense", train="dense"),
    *uniform(4),
    *uniform(3),
    *uniform(2),
    trained("ternary, rounded", jc.quantize.Ternary(), "none"),
    trained("ternary, straight-through (TWN)", jc.quantize.Ternary(), "simulate"),
    trained("ternary, TTQ", T.TTQ()),
    trained("binary, rounded", Int(bits=1), "none"),
    trained("binary, scale of each step (XNOR)", Int(bits=1), "simulate"),
    trained("binary, BinaryConnect", T.BinaryConnect()),
    trained("binary, BinaryConnect, learned scale", T.BinaryConnect(learned=True)),
]
TASKS = {
    "digits": Task("digits", "lenet_300_100", ".*kernel", 400, 400, 64, {"val": 0.2, "test": 0.2}),
    "mnist": Task("mnist", "lenet_300_100", ".*kernel", 400, 400, 100, {"val": 0.1}),
    "text": Task(
        "text", "transformer", "block_.*kernel", 200, 150, 16,
        {"length": 64, "val": 0.05}, {"width": 64, "layers": 2, "heads": 4, "longest": 64},
    ),
}  # fmt: skip
DENSE_RATE = 2e-3
RATES = (1e-3, 1e-2)
"""Of Adam at its peak, falling as a cosine. Each way on each task takes the one that validates best with seed 0."""


class Bench(Lab):
    """One task: its model, and each way compiled once for all seeds and rates."""

    def __init__(self, task: Task, data_dir: str | None) -> None:
        super().__init__(
            task.model, functools.partial(datasets.of, task.data, data_dir, task.data_options), task.model_options
        )
        self.task = task
        self.dense = functools.lru_cache(maxsize=1)(self._dense)

    def _dense(self, seed: int) -> PyTree:
        """The network from which all ways start."""
        return self.train("dense", None, "dense", self.start(seed), seed, DENSE_RATE, first=True)

    def train(
        self, name: str, method: Any, train: Train, params: PyTree, seed: int, rate: float, first: bool = False
    ) -> PyTree:
        """The tree as it is stored, after the steps of the task, or those of its dense network, which come first."""
        steps = self.task.dense if first else self.task.steps
        program, split = self.once((name, steps), lambda: self._program(method, train, steps)), self.load(seed).train
        order = batches(jax.random.key(seed if first else seed + 1000), len(split), self.task.batch_size)
        index = np.stack([batch for _, batch in zip(range(steps), order, strict=False)])
        return program(params, split.x, split.y, index, rate)

    def _program(self, method: Any, train: Train, steps: int) -> Any:
        """``run(params, x, y, order, rate)``, compiled."""
        plan = None if method is None else jc.plan(self.shapes, [(self.task.pattern, method)])

        def begin(params: PyTree) -> tuple[PyTree, PyTree]:
            if plan is None or train == "simulate":
                return params, None
            tree = jc.compress(params, plan)
            return jc.split(fixed(tree) if train == "fixed" else tree)

        def forward(trained: PyTree, held: PyTree) -> PyTree:
            if plan is None:
                return trained
            return jc.simulate(trained, plan) if held is None else jc.materialize(jc.merge(trained, held))

        def finish(trained: PyTree, held: PyTree) -> PyTree:
            if plan is None:
                return trained
            return jc.finalize(jc.compress(trained, plan) if held is None else jc.merge(trained, held))

        def run(params: PyTree, x: jax.Array, y: jax.Array, order: jax.Array, rate: jax.Array) -> PyTree:
            trained, held = begin(params)
            tx = optax.chain(
                optax.scale_by_adam(),
                optax.scale_by_schedule(optax.cosine_decay_schedule(-1.0, steps)),
                optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * rate, updates)),
                jc.quantize.training.clip_values(),
            )

            def step(carry: tuple, index: jax.Array) -> tuple:
                trained, state = carry
                grads = jax.grad(lambda trained: self.loss(forward(trained, held), x[index], y[index]))(trained)
                updates, state = tx.update(grads, state, trained)
                return (optax.apply_updates(trained, updates), state), None

            if train != "none":
                trained = jax.lax.scan(step, (trained, tx.init(trained)), order)[0][0]
            return finish(trained, held)

        return jax.jit(run)

    def score(self, params: PyTree, split: datasets.Split) -> float:
        """Accuracy in percent; of text, bits per byte."""
        found = self.evaluate(params, split)
        return found.bits if self.kind == "text" else 100 * found.accuracy


def fixed(tree: PyTree) -> PyTree:
    """The tree with scales that no optimizer touches."""

    def freeze(x: PyTree) -> PyTree:
        return dataclasses.replace(x, scale=Frozen.of(x.scale)) if isinstance(x, FakeQuantized) else x

    return jax.tree.map(freeze, tree, is_leaf=lambda x: isinstance(x, jc.Compressed))


class Training:
    """All tasks, seeds and ways, as the runner takes them.

    Raises:
      ValueError: for anything wrong with the data.
    """

    keys = ("task", "way", "seed")

    def __init__(self, tasks: Sequence[str], seeds: int, data_dir: str | None, only: str, workdir: str | None) -> None:
        self.ways = {way.name: way for way in WAYS if only in way.name}
        if not self.ways:
            raise ValueError(f"--only={only}: no way has this in its name; there are {'; '.join(w.name for w in WAYS)}")
        self.tasks, self.seeds = tasks, seeds
        self.workdir = Path(workdir or "runs/quantization/training")
        self.benches = {name: Bench(TASKS[name], data_dir) for name in tasks}
        ways = {way.name: way.told(None) for way in WAYS}
        ways |= {f"task {name}": dataclasses.asdict(TASKS[name]) for name in tasks}
        self.setting = {"rates": RATES, "dense_rate": DENSE_RATE, "ways": ways}

    def todo(self) -> Iterator[Row]:
        for task in self.tasks:
            for seed in range(self.seeds):
                for way in self.ways:
                    yield {"task": task, "way": way, "seed": seed}

    def measure(self, rows: Rows, task: str, way: str, seed: int) -> Row:
        """The row at the rate that validates best with the first seed."""
        first = rows.find(task=task, way=way, seed=0)
        rates = RATES if seed == 0 or first is None else (first["rate"],)
        found = [self._at(self.benches[task], way, seed, rate) for rate in rates]
        return (min if self.benches[task].kind == "text" else max)(found, key=lambda row: row["val"])

    def _at(self, bench: Bench, way: str, seed: int, rate: float) -> Row:
        tree, data = self.ways[way].make(bench, seed, rate), bench.load(seed)
        params, size = jc.materialize(tree), -(-jc.nbits(tree) // 8)
        return {
            "rate": rate, "bytes": size, "val": bench.score(params, data.val), "test": bench.score(params, data.test)
        }  # fmt: skip

    def line(self, row: Row) -> str:
        return f"{row['task']} seed {row['seed']} {row['way']}: {row['test']:.2f} (rate {row['rate']:g})"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return finish(rows, self.workdir / "table.md", self.workdir / "curve.png"), summary(rows)


def finish(rows: Sequence[Row], table: Path, picture: Path) -> str:
    """Write the table and the picture; return the table."""
    found = summary(rows)
    write(table, markdown(found) + "\n")
    pictures.quantized(found, {way.name: way.family for way in WAYS}, picture)
    return markdown(found)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation over seeds."""
    found = []
    for task, way in dict.fromkeys((r["task"], r["way"]) for r in rows):
        own = [r for r in rows if (r["task"], r["way"]) == (task, way)]
        mean, std = tables.mean_std([r["test"] for r in own])
        found.append({"task": task, "way": way, "mean": mean, "std": std or 0.0, "bytes": own[0]["bytes"]})
    return found


def markdown(found: Sequence[Row]) -> str:
    """The ways of all tasks side by side."""
    tasks = list(dict.fromkeys(r["task"] for r in found))
    units = {t: "bits per byte, lower is better" if t == "text" else "accuracy, %" for t in tasks}
    cells = [["way", *(f"{t}: {units[t]}" for t in tasks), *(f"{t}: bytes" for t in tasks)]]
    for way in dict.fromkeys(r["way"] for r in found):
        own = {r["task"]: r for r in found if r["way"] == way}
        scores = [tables.spread(own[t]["mean"], own[t]["std"]) if t in own else "" for t in tasks]
        cells.append([way, *scores, *(f"{own[t]['bytes']:,}" if t in own else "" for t in tasks)])
    return tables.markdown(cells, range(len(cells[0])))


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/quantization/training")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="all, or those without files")
    parser.add_argument("--seeds", type=flags.positive, default=3)
    parser.add_argument("--only", default="", help="ways whose name has this in it")
    args = parser.parse_args(argv)
    tasks = args.tasks or (list(TASKS) if args.data_dir else ["digits"])

    def prepare(_: runner.Signals) -> Training:
        return Training(tasks, args.seeds, args.data_dir, args.only, args.workdir)

    return runner.main(prepare, args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
