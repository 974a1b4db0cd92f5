"""Networks trained in 4, 3, 2 and 1 bits and in three values, from one dense network each, with equal steps.

    python -m experiments.quantization.training --data_dir=<folder with MNIST's idx files and tinyshakespeare.txt>

``experiments/configs/quantization/training.py`` says what is trained. Nothing is chosen by the test split: the learning
rate of a way is that of the two which validates better with the first seed. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jcompress as jc
from experiments import data as datasets
from experiments import models, train
from experiments.benchmarks.timing import environment
from experiments.configs.quantization.training import DENSE_RATE, RATES, TASKS, WAYS, Task, Way
from jcompress.formats import FakeQuantized, Frozen

PyTree = Any


class Bench:
    """One task: its model, and each way compiled once for all seeds and rates."""

    def __init__(self, task: Task, data_dir: str | None) -> None:
        self.task, self.data_dir = task, data_dir
        data = self.data(0)
        self.kind = data.kind
        self.module = models.build(task.model, data.classes, dict(task.model_options))
        self.apply = models.apply(self.module)
        self.evaluate = train.make_evaluate(self.apply)
        self.initialize = jax.jit(lambda key: self.module.init(key, data.train.x[:1])["params"])
        shapes = jax.eval_shape(self.initialize, jax.random.key(0))
        self.dense = self.program(None, shapes, task.dense)
        self.ways = {name: self.program(way, shapes, task.steps) for name, way in WAYS.items()}

    def data(self, seed: int) -> datasets.Data:
        return datasets.load(self.task.data, self.data_dir, seed, **self.task.data_options)

    def program(self, way: Way | None, shapes: PyTree, steps: int) -> Any:
        """``run(params, x, y, order, rate)``, the tree as it is stored."""
        plan = jc.plan(shapes, [(self.task.pattern, way.method)]) if way else None

        def begin(params: PyTree) -> tuple[PyTree, PyTree]:
            if plan is None or way.train == "simulate":
                return params, None
            tree = jc.compress(params, plan)
            return jc.split(fixed(tree) if way.train == "fixed" else tree)

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

                def loss(trained: PyTree) -> jax.Array:
                    return train.cross_entropy(self.apply(forward(trained, held), x[index]), y[index]).mean()

                updates, state = tx.update(jax.grad(loss)(trained), state, trained)
                return (optax.apply_updates(trained, updates), state), None

            if way is None or way.train != "none":
                trained = jax.lax.scan(step, (trained, tx.init(trained)), order)[0][0]
            return finish(trained, held)

        return jax.jit(run)

    def start(self, seed: int, data: datasets.Data) -> PyTree:
        params = self.initialize(jax.random.key(seed))
        return self.dense(params, data.train.x, data.train.y, self.order(data, seed, self.task.dense), DENSE_RATE)

    def order(self, data: datasets.Data, seed: int, steps: int) -> np.ndarray:
        """The examples of each step."""
        batches = train.batches(jax.random.key(seed), len(data.train), self.task.batch_size)
        return np.stack([batch for _, batch in zip(range(steps), batches, strict=False)])

    def measure(self, name: str, rate: float, seed: int, data: datasets.Data, start: PyTree) -> dict[str, Any]:
        order = self.order(data, seed + 1000, self.task.steps)
        tree = self.ways[name](start, data.train.x, data.train.y, order, rate)
        params = jc.materialize(tree)
        row = {"task": self.task.data, "way": name, "seed": seed, "rate": rate, "bytes": -(-jc.nbits(tree) // 8)}
        return {**row, "val": self.score(params, data.val), "test": self.score(params, data.test)}

    def score(self, params: PyTree, split: datasets.Split) -> float:
        """Accuracy in percent; of text, bits per byte."""
        found = self.evaluate(params, split)
        return found.bits if self.kind == "text" else 100 * found.accuracy


def fixed(tree: PyTree) -> PyTree:
    """The tree with scales that no optimizer touches."""

    def freeze(x: PyTree) -> PyTree:
        return dataclasses.replace(x, scale=Frozen.of(x.scale)) if isinstance(x, FakeQuantized) else x

    return jax.tree.map(freeze, tree, is_leaf=lambda x: isinstance(x, jc.Compressed))


def measure_all(tasks: Sequence[str], seeds: int, data_dir: str | None, only: str, path: Path) -> list[dict[str, Any]]:
    """Rows of all measurements, those that ``path`` has already as they are there."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name in tasks:
        bench = Bench(TASKS[name], data_dir)
        done = {(r["way"], r["seed"]): r for r in rows if r["task"] == name}
        best = {way: r["rate"] for (way, seed), r in done.items() if seed == 0}
        for seed in range(seeds):
            todo = [way for way in WAYS if only in way and (way, seed) not in done]
            if not todo:
                continue
            data = bench.data(seed)
            start = bench.start(seed, data)
            for way in todo:
                rates = (best[way],) if seed else RATES
                found = [bench.measure(way, rate, seed, data, start) for rate in rates]
                row = (min if bench.kind == "text" else max)(found, key=lambda r: r["val"])
                best[way] = row["rate"]
                rows.append(row)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name} seed {seed} {way}: {row['test']:.2f} (rate {row['rate']:g})", flush=True)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds."""
    found = []
    for task, way in dict.fromkeys((r["task"], r["way"]) for r in rows):
        own = [r for r in rows if (r["task"], r["way"]) == (task, way)]
        scores = np.array([r["test"] for r in own])
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
        size = own[0]["bytes"]
        found.append({"task": task, "way": way, "mean": float(scores.mean()), "std": spread, "bytes": size})
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(r["task"] for r in found))
    units = {t: "bits per byte, lower is better" if t == "text" else "accuracy, %" for t in tasks}
    heads = [f"{t}: {units[t]}" for t in tasks] + [f"{t}: bytes" for t in tasks]
    lines = ["| way | " + " | ".join(heads) + " |", "|" + " --- |" * (len(heads) + 1)]
    for way in dict.fromkeys(r["way"] for r in found):
        own = {r["task"]: r for r in found if r["way"] == way}
        cells = [f"{own[t]['mean']:.2f} ± {own[t]['std']:.2f}" for t in tasks] + [f"{own[t]['bytes']:,}" for t in tasks]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(found: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r["task"] for r in found))
    ways = list(dict.fromkeys(r["way"] for r in found))[::-1]
    figure = Figure(figsize=(4 * len(tasks) + 3, 0.3 * len(ways) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(plots, tasks, strict=True):
        own = {r["way"]: r for r in found if r["task"] == task}
        trained = [way for way in ways if "rounded" not in way]
        for i, way in enumerate(trained):
            axes.errorbar(own[way]["mean"], i, xerr=own[way]["std"], fmt="o", capsize=3, color=colour(way))
        axes.axvline(own["dense"]["mean"], color="0.7", linewidth=1, zorder=0)
        axes.set_yticks(range(len(trained)), trained)
        axes.set_title(task)
        axes.set_xlabel("bits per byte" if task == "text" else "test accuracy, %")
        if task == "text":
            axes.invert_xaxis()
    figure.savefig(path, dpi=110)


def colour(way: str) -> str:
    return {"d": "black", "4": "tab:green", "3": "tab:blue", "2": "tab:purple", "t": "tab:orange"}.get(
        way[0], "tab:red"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default=None, help="folder with the files of the data that are not embedded")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=None, help="all, or those without files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="ways whose name has this in it")
    parser.add_argument("--out", default="runs/quantization/training", help="path of the files, without an ending")
    args = parser.parse_args(argv)
    tasks = args.tasks or (list(TASKS) if args.data_dir else ["digits"])
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = measure_all(tasks, args.seeds, args.data_dir, args.only, out.with_suffix(".jsonl"))
    rows = [r for r in rows if r["task"] in tasks and r["seed"] < args.seeds]
    found = summary(rows)
    settings = {name: dataclasses.asdict(TASKS[name]) for name in tasks}
    record = {"environment": environment(), "tasks": settings, "rates": RATES, "summary": found, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(found) + "\n")
    if not args.only:
        picture(found, out.with_suffix(".png"))
    print(markdown(found))


if __name__ == "__main__":
    main()
