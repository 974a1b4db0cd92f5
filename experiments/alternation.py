"""Learning-compression beside compressing first and training then: equal steps, equal bytes or as many weights.

    python -m experiments.alternation --data=mnist --data_dir=D
    python -m experiments.alternation --networks=lenet_300_100 --epochs=20 --parts=1 --seeds=1

From one dense network each: codebooks of two and of four values (1 and 2 bits a weight), and masks of 2% of all
weights. *Compressed, then trained* trains the values that are left (codebooks, kept weights, biases); *learning and
compression* (:func:`jcompress.lc`) trains all weights under a penalty that grows and leads them there, equally long.
The set of masks tightens on the way, from all weights to 2% of them along a cubic ramp over half of the steps. Masks
have two ways more: led to 2% from the start, and that ramp without a penalty, which is gradual pruning
(:func:`jcompress.project`). Penalties, the part of the steps over which they grow to their end, and the length of the
ramp were chosen for LeNet-300-100 by the last training images of another seed; the CNN takes the same. The test images
are read once for each row.

Expect from the literature: Carreira-Perpinan & Idelbayev (2017, arXiv:1707.01319) report LeNet-300-100 with one bit a
weight at the dense error, where training after compression loses several points.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jcompress as jc
from experiments import flags, runner, tables
from experiments.pipelines import Bench, dense, load_split
from experiments.workdir import Row, Rows, write

PyTree = Any
KERNELS, EVERY, RATE = ".*/kernel", 50, 1e-3
METHODS = {
    "1 bit": jc.share.KMeans(clusters=2),
    "2 bits": jc.share.KMeans(clusters=4),
    "2% of the weights": jc.prune.Magnitude(sparsity=0.98, scope="global"),
}
WAYS = ("compressed, then trained", "learning and compression")
OF_MASKS = ("the same, not tightened", "tightened alone")
RAMP = 0.5
"""Of the steps, over which the set of masks tightens."""
PENALTIES = {"1 bit": 1e-3, "2 bits": 1e-3, "2% of the weights": 1e-2}
"""At first, in units of one over the step size; it grows to 1."""


class Alternation:
    """A row for each network, seed, method and way, as the runner takes them."""

    keys = ("network", "seed", "method", "way")

    def __init__(self, args: Any) -> None:
        load = functools.partial(load_split, args.data, args.data_dir)
        networks = args.networks.split(",")
        for flag in ("epochs", "parts"):
            if len(getattr(args, flag).split(",")) != len(networks):
                raise ValueError(f"--{flag}={getattr(args, flag)}: expected a number for each of {args.networks}")
        self.epochs, self.parts = (
            dict(zip(networks, map(float, x.split(",")), strict=True)) for x in (args.epochs, args.parts)
        )
        self.benches = {name: Bench(name, load) for name in self.epochs}
        self.workdir, self.seeds = Path(args.workdir or f"runs/alternation/{args.data}"), args.seeds
        self.setting = {
            "data": args.data, "epochs": self.epochs, "parts": self.parts, "penalties": PENALTIES, "ramp": RAMP
        }  # fmt: skip
        self._dense: dict[Any, PyTree] = {}

    def todo(self) -> Iterator[Row]:
        for network in self.benches:
            for seed in range(self.seeds):
                yield {"network": network, "seed": seed, "method": "dense", "way": "trained"}
                for method, found in METHODS.items():
                    ways = (*WAYS, *OF_MASKS) if isinstance(found, jc.prune.Magnitude) else WAYS
                    yield from ({"network": network, "seed": seed, "method": method, "way": way} for way in ways)

    def measure(self, rows: Rows, network: str, seed: int, method: str, way: str) -> Row:
        bench, epochs = self.benches[network], self.epochs[network]
        if (network, seed) not in self._dense:
            self._dense = {(network, seed): dense(bench, None, 100 * seed, epochs=epochs)}
        tree = self._dense[network, seed]
        if method != "dense":
            chosen = METHODS[method]
            if isinstance(chosen, jc.prune.Magnitude) and way in (WAYS[1], OF_MASKS[1]):
                chosen = _tightened(chosen, int(RAMP * bench.steps(epochs)))
            plan = jc.plan(tree, [(KERNELS, chosen), (".*", None)])
            make = {WAYS[0]: tuned, OF_MASKS[1]: projected}.get(way, alternated)
            tree = make(bench, tree, plan, (method, way, self.parts[network], epochs), 100 * seed + 1)
        params, data = jc.materialize(tree), bench.load(0)
        errors = {name: 100 * (1 - bench.evaluate(params, getattr(data, name)).accuracy) for name in ("val", "test")}
        return {"bits": jc.nbits(tree), **errors}

    def line(self, row: Row) -> str:
        return f"{row['network']}, seed {row['seed']}, {row['method']}, {row['way']}: {row['val']:.2f}% held out"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return publish(rows, self.workdir / "table.md"), None


def tuned(bench: Bench, params: PyTree, plan: jc.Plan, name: Any, seed: int) -> PyTree:
    """Compressed; what trains in the nodes is trained."""
    train, held = jc.split(jc.compress(params, plan))

    def loss(train: PyTree, held: Any, x: Any, y: Any, targets: Any, key: Any) -> jax.Array:
        return bench.hard(jc.materialize(jc.merge(train, held)), x, y, targets)

    epochs = name[-1]
    tx = optax.adam(_pace(bench, epochs))
    return jc.merge(bench.fit(("tuned", name), train, held, loss, tx, epochs, seed, None)[0], held)


def _tightened(method: jc.prune.Magnitude, steps: int) -> jc.prune.Magnitude:
    """From all weights to those that stay, along a cubic ramp."""
    return dataclasses.replace(method, sparsity=optax.polynomial_schedule(0.0, method.sparsity, 3, steps))


def alternated(bench: Bench, params: PyTree, plan: jc.Plan, name: Any, seed: int) -> PyTree:
    """All weights trained, and led to the set of compressed ones."""
    method, _, part, epochs = name
    first = PENALTIES[method]
    grows = optax.exponential_decay(first, max(int(part * bench.steps(epochs)), 1), 1 / first, end_value=1.0)
    return _held(bench, params, jc.lc(plan, every=_every(bench, epochs), mu=grows), name, seed)


def projected(bench: Bench, params: PyTree, plan: jc.Plan, name: Any, seed: int) -> PyTree:
    """All weights trained, and kept on the set."""
    return _held(bench, params, jc.project(plan, every=_every(bench, name[-1])), name, seed)


def _every(bench: Bench, epochs: float) -> int:
    """Steps between C steps, of short runs fewer: a ramp has five at least."""
    return max(min(EVERY, int(RAMP * bench.steps(epochs) / 5)), 1)


def _held(bench: Bench, params: PyTree, by: optax.GradientTransformation, name: Any, seed: int) -> PyTree:
    epochs = name[-1]

    def loss(train: PyTree, held: Any, x: Any, y: Any, targets: Any, key: Any) -> jax.Array:
        return bench.hard(train, x, y, targets)

    tx = optax.chain(optax.adam(_pace(bench, epochs)), by)
    return jc.nodes(*bench.fit(("held", name), params, None, loss, tx, epochs, seed, None))


def _pace(bench: Bench, epochs: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(RATE, bench.steps(epochs), alpha=0.01)


def publish(rows: Sequence[Row], path: Path) -> str:
    """Write the table: means over seeds, and the mean of what each seed gains, with its standard error."""
    head = ["network", "method", "bytes", *(f"{x}: test error, %" for x in WAYS), "gain", "seeds that gain", *OF_MASKS]
    shown = [head]
    for network, method in dict.fromkeys((row["network"], row["method"]) for row in rows):
        own = [row for row in rows if (row["network"], row["method"]) == (network, method)]
        stored = f"{sum(row['bits'] for row in own) / len(own) / 8:,.0f}"
        found = [[row["test"] for row in own if row["way"] == way] for way in ("trained", *WAYS, *OF_MASKS)]
        dense, *cells = [tables.spread(*tables.mean_std(x)) if x else "" for x in found]
        if dense:
            shown.append([network, method, stored, dense, *[""] * (len(head) - 4)])
            continue
        gains = np.subtract(*([x[: min(map(len, found[1:3]))] for x in found[1:3]]))
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        told = f"{gains.mean():.2f} ± {error:.2f}" if len(gains) else ""
        count = f"{int((gains > 0).sum())} of {len(gains)}" if len(gains) else ""
        shown.append([network, method, stored, *cells[:2], told, count, *cells[2:]])
    text = tables.markdown(shown, (0, 1))
    write(path, text + "\n")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/alternation/<data>")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--networks", default="lenet_300_100,cnn")
    parser.add_argument("--epochs", default="16,8", help="of the dense networks, and again of every way")
    parser.add_argument("--parts", default="1,1", help="of the steps, over which the penalty grows")
    parser.add_argument("--seeds", type=flags.positive, default=5)
    args = parser.parse_args(argv)
    return runner.main(lambda signals: Alternation(args), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
