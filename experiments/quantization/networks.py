"""A pretrained ResNet in few bits after training only, activations in 8 bits besides.

    python -m experiments.quantization.networks --data_dir=<folder with CIFAR-10 and resnet20_cifar10.npz>

Batch norms are in the kernels and biases. Weights have a scale for each output: rounded, with ranges of least error, or
by GPTQ on 1,000 training images; or in steps by water-filling, whose codes have 8 bits: their coded bytes alone count;
or as walks through a trellis of rotated inputs, for the outputs, of at most 4 bits.
Activations have one range for each product, of 500 other training images (``static``), or one for each image as it
comes (``dynamic``). Biases stay as they are. Bytes are those of the file, plain and entropy-coded.

Expect from the literature: Krishnamoorthi (2018, arXiv:1806.08342) finds 8 bits an output, weights and activations,
within 0.2 points of the float networks on ImageNet, and 4 bits far off without training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jcompress as jc
from experiments import data as datasets
from experiments import flags, lab, tables
from experiments.codec.networks import ResNet
from experiments.families.ways import Walks
from experiments.runner import refuse
from experiments.workdir import Row, keep

Q = jc.quantize
METHODS: dict[str, Callable[[int], Any]] = {
    "rounding": lambda bits: Q.Int(bits=bits),
    "least error": lambda bits: Q.Int(bits=bits, clip="mse"),
    "GPTQ": lambda bits: Q.GPTQ(bits=bits, clip="mse"),
    "water-filling": lambda bits: Q.WaterFilling(2 ** (1.8 - bits)),
    "trellis": Walks,
}
MOST = {"trellis": 4}
"""The most bits, of those that do not go to 8."""


class Bench:
    """One network, its ranges, and what is measured of a tree."""

    def __init__(self, path: Path, data_dir: str, test: int, images: int = 1000) -> None:
        self.network, data = ResNet(path, data_dir, images, images), datasets.load("cifar10", data_dir)
        self.fn, self.params, self.test = self.network.apply, self.network.params, data.test.take(slice(test))
        self.ranges = jc.calibrate(self.fn, self.params, [data.train.x[: images // 2]], statistics=["absmax"])

    def tree(self, method: Any) -> Any:
        """The network with its kernels by a method."""
        plan = jc.plan(self.params, [(self.network.kernels, method), (".*", None)], layout=self.network.layout)
        return jc.compress(self.params, plan, stats=self.network.stats)

    def row(self, way: str, bits: int, tree: Any, fn: Any = None) -> Row:
        """What a tree takes, and its error by a function of it."""
        evaluate = lab.make_evaluate(fn or (lambda tree, x: self.fn(jc.materialize(tree), x)), 250)
        stored = {"bytes": -(-jc.nbits(tree) // 8), "coded": -(-jc.nbits(tree, coded=True) // 8)}
        return {"way": way, "bits": bits, **stored, "error": 100 * (1 - evaluate(tree, self.test).accuracy)}


def run(bench: Bench, widths: Sequence[int]) -> list[Row]:
    """All rows."""
    rows = [bench.row("dense", 32, bench.params)]
    for bits in widths:
        made = {name: make(bits) for name, make in METHODS.items() if bits <= MOST.get(name, bits)}
        rows += [bench.row(name, bits, bench.tree(method)) for name, method in made.items()]
        tree = bench.tree(made["GPTQ"])
        for name, options in {"static": {"stats": bench.ranges}, "dynamic": {"scale": "row"}}.items():
            fn = Q.activations(bench.fn, tree, mode="simulate", **options)
            rows.append(bench.row(f"GPTQ, {name} activations", bits, tree, fn))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    shown = [["weights", "bits", "bytes", "coded", "test error, %", "against dense"]]
    for row in rows:
        sizes = [f"{row['bytes']:,}", f"{row['coded']:,}"]
        change = f"{row['error'] - rows[0]['error']:+.2f}"
        shown.append([row["way"], str(row["bits"]), *sizes, f"{row['error']:.2f}", change])
    return tables.markdown(shown, (0,))


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/networks")
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--test", type=flags.positive, default=10_000, help="test images")
    args = parser.parse_args(argv)
    try:
        widths = [int(x) for x in args.bits.split(",")]
        bench = Bench(Path(args.data_dir or ".") / f"{args.model}_cifar10.npz", args.data_dir, args.test)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    rows = run(bench, widths)
    print(table(rows))
    command = flags.told("experiments.quantization.networks", parser, args)
    keep(args.workdir or "runs/networks", args.model, {"command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
