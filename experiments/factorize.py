"""A pretrained ResNet in factors, without any training: test error at given shares of its convolutions' numbers.

Example:
  python -m experiments.factorize --data_dir=<folder with CIFAR-10 and resnet56_cifar10.npz>

Each family keeps the same share of every convolution; ``chosen`` gives each the family and the rank of its own, under
one budget of numbers, by the error of outputs in units of the loss: the divergence from the dense network's outputs on
training images (``jc.budget.by_loss``). ``random`` has random factors, refitted by one sweep: the control. Errors are
on the first ``--test`` test images, with batch statistics as they were and estimated anew on augmented training images.
Statistics for whitening are of other training images. Nothing is chosen on test images.

It writes ``--workdir``/factorize_<model>.json and prints the table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jcompress as jc
from experiments import data as datasets
from experiments import flags
from experiments.models import resnet
from experiments.runner import refuse
from experiments.workdir import keep

F = jc.factorize
KERNELS = r".*conv\d/weight"
ORDER = (-2, 0, 1, -1)
FAMILIES = {
    "svd": lambda share: F.SVD(rank=share),
    "whitened svd": lambda share: F.WhitenedSVD(rank=share, damping=1e-2),
    "tensor train": lambda share: F.TensorTrain(rank=share, order=ORDER),
    "tensor train, best order": lambda share: F.TensorTrain(rank=share, order="best"),
    "tucker-2": lambda share: F.Tucker(ranks=share),
    "whitened tucker-2": lambda share: F.Whitened(F.Tucker(ranks=share)),
    "cp": lambda share: F.CP(rank=share),
    "whitened cp": lambda share: F.Whitened(F.CP(rank=share)),
}
LADDER = (0.1, 0.15, 0.22, 0.31, 0.42, 0.56, 0.75)
OPTIONS = ("whitened cp",)


class Bench:
    """One network, its data, and what is measured of a tree."""

    def __init__(self, path: Path, data: datasets.Data, test: int, calibration: int, restated: int) -> None:
        self.params, self.statistics = resnet.load(path)
        self.test, self.images = data.test.take(slice(test)), data.train.x[:restated]
        self.layout = jc.trace.layout(self._fn, self.params, data.test.x[:1])
        self.layout = {p: x for p, x in self.layout.items() if p in self._kernels()}
        batches = [resnet.augmented(data.train.x[i : i + 100], i) for i in range(restated, restated + calibration, 100)]
        plan = self.plan(F.Whitened(F.CP(rank=1)))
        self.stats = jc.calibrate(self._fn, self.params, batches, plan=plan)
        self._logits = jax.jit(resnet.logits)
        self.seen = batches[0]
        self.wanted = jax.nn.log_softmax(self._logits(self.params, self.seen, self.statistics))

    def divergence(self, params: Any) -> Any:
        """From the dense network's outputs on training images, in nats an image."""
        return (jnp.exp(self.wanted) * (self.wanted - jax.nn.log_softmax(self._fn(params, self.seen)))).sum(-1).mean()

    def _fn(self, params: Any, x: Any) -> Any:
        return resnet.logits(params, x, self.statistics)

    def _kernels(self) -> list[str]:
        return [path for path, x in self.params.items() if x.ndim == 4 and path != "conv1/weight"]

    def plan(self, method: Any) -> jc.Plan:
        """All convolutions but the first, of three input channels, by one method."""
        return jc.plan(self.params, [("conv1/weight", None), (KERNELS, method)], layout=self.layout)

    def numbers(self, tree: Any) -> dict[str, int]:
        """Numbers that each leaf keeps, by path."""
        return {path: bits // 32 for path, bits in jc.budget.bits(tree).items()}

    def error(self, params: Any, statistics: Mapping[str, Any]) -> float:
        """The test error in percent."""
        found = [
            np.asarray(self._logits(params, self.test.x[i : i + 250], statistics)).argmax(-1)
            for i in range(0, len(self.test), 250)
        ]
        return 100 * float(np.mean(np.concatenate(found) != self.test.y))

    def row(self, family: str, share: float, tree: Any) -> dict[str, Any]:
        """What a tree keeps and how it does."""
        dense = jc.materialize(tree)
        kept, whole = (sum(self.numbers(t)[p] for p in self._kernels()) for t in (tree, self.params))
        return {
            "family": family,
            "share": share,
            "numbers": kept / whole,
            "error": self.error(dense, self.statistics),
            "restated": self.error(dense, resnet.restated(dense, self.images)),
        }


def randomized(tree: Any, params: Any, seed: int) -> Any:
    """Networks of random factors, refitted to the arrays by one sweep."""
    rng = np.random.default_rng(seed)

    def one(node: Any, w: Any) -> Any:
        drawn = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), np.float32), node)
        return drawn.project(w)

    nodes = {path: one(x, params[path]) for path, x in tree.items() if jc.core.is_node(x)}
    return {**tree, **nodes}


class Chosen:
    """Families and ranks for all layers under one budget."""

    def __init__(self, bench: Bench) -> None:
        self.plans = {f"{name} {x:g}": bench.plan(FAMILIES[name](x)) for name in OPTIONS for x in LADDER}
        self.plans["dense"] = bench.plan(None)
        moved = jc.budget.output_error(bench.stats, relative=True)
        typical = jc.compress(bench.params, bench.plan(FAMILIES[OPTIONS[0]](0.3)), stats=bench.stats)
        measure = jc.budget.by_loss(bench.divergence, bench.params, typical, measure=moved)
        self.options = jc.budget.options(
            bench.params, self.plans, measure=measure, cost=bench.numbers, stats=bench.stats
        )
        whole = bench.numbers(bench.params)
        self.kernels = sum(whole[p] for p in bench.layout)
        self.others = sum(whole.values()) - self.kernels

    def plan(self, share: float) -> jc.Plan:
        """The plan that keeps at most this share of the kernels' numbers."""
        budget = math.floor(share * self.kernels) + self.others
        return jc.budget.allocate(self.plans, self.options.errors, self.options.costs, budget)


def run(bench: Bench, shares: Sequence[float]) -> list[dict[str, Any]]:
    """The rows of all families at all shares."""
    rows = [bench.row("dense", 1.0, bench.params)]
    chosen = Chosen(bench)
    for share in tqdm(shares, desc="shares"):
        for name, make in FAMILIES.items():
            tree = jc.compress(bench.params, bench.plan(make(share)), stats=bench.stats)
            rows.append(bench.row(name, share, tree))
            if name == "cp":
                rows.append(bench.row("random", share, randomized(tree, bench.params, 0)))
        rows.append(bench.row("chosen", share, jc.compress(bench.params, chosen.plan(share), stats=bench.stats)))
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'family':18} {'share':>6} {'numbers':>8} {'error':>7} {'restated':>9}"]
    for row in rows:
        after = f"{row['restated']:9.2f}" if "restated" in row else " " * 9
        lines.append(f"{row['family']:18} {row['share']:6.2f} {row['numbers']:8.3f} {row['error']:7.2f} {after}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = flags.parser(__doc__, "results/factorize")
    parser.add_argument("--model", default="resnet56", choices=("resnet20", "resnet56"))
    parser.add_argument("--shares", default="0.5,0.35,0.25")
    parser.add_argument("--test", type=flags.positive, default=2000, help="test images")
    parser.add_argument("--calibration", type=flags.positive, default=500, help="training images for the statistics")
    parser.add_argument("--restated", type=flags.positive, default=2000, help="training images for batch statistics")
    args = parser.parse_args(argv)
    try:
        data = datasets.load("cifar10", args.data_dir)
        path = Path(args.data_dir) / f"{args.model}_cifar10.npz"
        bench = Bench(path, data, args.test, args.calibration, args.restated)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    rows = run(bench, [float(x) for x in args.shares.split(",")])
    print(table(rows))
    config = {name: value for name, value in vars(args).items() if name not in flags.FOLDERS}
    record = {"command": flags.told("experiments.factorize", parser, args), "config": config, "rows": rows}
    keep(args.workdir or "results/factorize", f"factorize_{args.model}", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
