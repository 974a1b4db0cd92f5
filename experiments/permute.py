"""Units of a pretrained ResNet in another order, so that words of several inputs fit its kernels better.

Example:
  python -m experiments.permute --model=resnet56 --data_dir=<folder with CIFAR-10 and resnet56_cifar10.npz>

Each convolution but the first is stored as a codebook of words of ``--block`` inputs, at most 256 and an eighth of its
blocks, before and after ``jc.rewrite.permute``, at equal bytes; the control are random orders of the same groups, three
of them. Martinez et al. (2021, arXiv:2010.15703) report lower errors for the layers that they permute. Errors of layers
are relative, in the kernels; that of the network is on the first ``--test`` test images, with batch statistics as they
were. Nothing is chosen on test images. With ``--steps``, words, norms and the head are then trained for so many steps
of 64 images, for each of ``--seeds`` with images of its own, and batch statistics are estimated anew before and after.

It writes ``--workdir``/permute_<model>.json and prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments import data as datasets
from experiments import flags, lab, tables
from experiments.families import lab as families
from experiments.families.__main__ import lab_of
from experiments.models import resnet
from experiments.runner import refuse
from experiments.workdir import Row, keep

PyTree = Any
KERNELS = r"weights/.*conv\d/weight"
FIRST = "weights/conv1/weight"


def fixed(both: PyTree, x: Any) -> Any:
    """Logits, with batch statistics that are leaves, so that they change places with what they belong to."""
    return resnet.logits(both["weights"], x, both["statistics"])


class Bench:
    """One network, and what is measured of its units in some order."""

    def __init__(
        self, path: Path, data: datasets.Data, block: int, test: int, tuned: Callable[[PyTree], Row] | None = None
    ) -> None:
        self.tuned = tuned
        weights, statistics = resnet.load(path)
        self.params, self.block = {"weights": weights, "statistics": statistics}, block
        self.test, self.example = data.test.take(slice(test)), data.train.x[:8]
        self.groups = jc.trace.coupling(fixed, self.params, self.example)
        layout = jc.trace.layout(fixed, self.params, self.example)
        kernels = list(jc.plan(self.params, [(FIRST, None), (KERNELS, jc.quantize.Int(8))]))
        self.leaves = dict(jc.paths(self.params))
        self.kernels = [path for path in kernels if path != FIRST and self.leaves[path].ndim == 4]
        rules = [(path.replace(".", r"\."), self.words(self.leaves[path].size)) for path in self.kernels]
        self.plan = jc.plan(self.params, rules, layout={path: layout[path] for path in self.kernels})
        self.evaluate = lab.make_evaluate(fixed, 250)

    def words(self, size: int) -> jc.share.KMeans:
        """A codebook for a kernel of so many numbers."""
        return jc.share.KMeans(clusters=min(256, size // self.block // 8), block=(self.block, 1))

    def row(self, order: str, params: PyTree) -> Row:
        """Errors of all layers and of the network, of units in this order."""
        y, z = (np.asarray(jax.jit(fixed)(p, self.example)) for p in (self.params, params))
        small = jc.compress(params, self.plan)
        dense = jc.materialize(small)
        before, after = dict(jc.paths(params)), dict(jc.paths(dense))
        errors = {p: float(jnp.linalg.norm(after[p] - before[p]) / jnp.linalg.norm(before[p])) for p in self.kernels}
        return {
            "order": order,
            "bytes": jc.nbits(small) // 8,
            "outputs_moved": float(np.abs(y - z).max() / np.abs(y).max()),
            "error": 100 * (1 - self.evaluate(dense, self.test).accuracy),
            "layers": errors,
            **(self.tuned(small) if self.tuned else {}),
        }

    def shuffled(self, orders: dict[str, np.ndarray], seed: int) -> PyTree:
        """The same groups in random orders."""
        rng, leaves = np.random.default_rng(seed), dict(self.leaves)
        for name in orders:
            order = rng.permutation(self.groups[name].size)
            for path, axis in self.groups[name].members:
                index = np.arange(leaves[path].shape[axis])
                table = jc.layers.units.positions(self.groups[name].maps[path, axis], len(order))
                index[table] = table[order]
                leaves[path] = jnp.take(leaves[path], jnp.asarray(index), axis=axis)
        return jc.rules.rebuild(self.params, leaves)


def tuner(model: str, data_dir: str, test: int, steps: int, seeds: int) -> Callable[[PyTree], Row]:
    """What trains words: test errors with statistics that are estimated anew, before and, by seed, after the steps."""
    config = families.Config(
        data="cifar10", data_options={"val": 0.02}, model=model, rules=r".*conv\d/weight", kept="conv1/weight",
        finetuning=steps, finetuning_rate=2e-3, test=test,
    )  # fmt: skip
    trained = lab_of(config, data_dir)

    def error(network: families.Network, seed: int) -> float:
        return 100 * (1 - trained.score(network, seed)["test_accuracy"])

    def tuned(small: PyTree) -> Row:
        network = families.Network(small["weights"] | small["statistics"])
        found = [error(trained.finetuned(network, seed), seed) for seed in range(seeds)]
        return {"restated": error(network, 0), "tuned": found}

    return tuned


def run(bench: Bench) -> list[Row]:
    """As it is, permuted, and the control."""
    options = {"fn": lambda both: fixed(both, bench.example)}
    found, orders = jc.rewrite.permute(bench.params, bench.groups, bench.block, **options)
    better, _ = jc.rewrite.permute(bench.params, bench.groups, bench.block, words=256, **options)
    kinds = {"as it is": bench.params, "permuted": found, "permuted where words gain": better}
    rows = [bench.row(name, params) for name, params in kinds.items()]
    rows += [bench.row(f"random {seed}", bench.shuffled(orders, seed)) for seed in range(3)]
    readers = [[path for path, _ in bench.groups[name].consumers if path in bench.kernels] for name in orders]
    shared = {path for paths in readers if len(paths) > 1 for path in paths}
    read = {"of one group": sorted({path for paths in readers for path in paths} - shared), "shared": sorted(shared)}
    return [{**row, "groups": len(orders), "read": read} for row in rows]


def table(rows: Sequence[Row]) -> str:
    """A line for each order: kernels that read what was permuted, in a block and along the shortcuts; the network."""
    heads = ["inside a block: better", "error", "along the shortcuts: better", "error"]
    after = ["restated", "tuned"] if "tuned" in rows[0] else []
    shown = [["order", *heads, "bytes", "test error, %", *after, "outputs moved"]]
    for row in rows:
        cells: list[str] = []
        for paths in row["read"].values():
            better = [row["layers"][path] < rows[0]["layers"][path] for path in paths]
            mean = np.mean([row["layers"][path] for path in paths])
            cells += [f"{sum(better)} of {len(better)}", f"{mean:.4f}"]
        cells += [f"{row['bytes']:,}", f"{row['error']:.2f}"]
        if after:
            cells += [f"{row['restated']:.2f}", tables.spread(*tables.mean_std(row["tuned"]))]
        shown.append([row["order"], *cells, f"{row['outputs_moved']:.1e}"])
    return tables.markdown(shown, (0,))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = flags.parser(__doc__, "results/sharing")
    parser.add_argument("--model", default="resnet56", choices=("resnet20", "resnet56"))
    parser.add_argument("--block", type=flags.positive, default=4, help="inputs of a word")
    parser.add_argument("--test", type=flags.positive, default=2000, help="test images")
    parser.add_argument("--steps", type=int, default=0, help="of training words, norms and the head")
    parser.add_argument("--seeds", type=flags.positive, default=3, help="of the training")
    args = parser.parse_args(argv)
    try:
        data = datasets.load("cifar10", args.data_dir)
        tuned = tuner(args.model, args.data_dir, args.test, args.steps, args.seeds) if args.steps else None
        bench = Bench(Path(args.data_dir) / f"{args.model}_cifar10.npz", data, args.block, args.test, tuned)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    rows = run(bench)
    print(table(rows))
    record = {"command": flags.told("experiments.permute", parser, args), "rows": rows}
    keep(args.workdir or "results/sharing", f"permute_{args.model}", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
