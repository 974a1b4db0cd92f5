"""The entropy coder alone: how fast it writes and reads, and how near its sizes are to the entropy of its own model.

    python -m experiments.benchmarks.coder --data_dir=D

One large array of Gaussian codes; the kernels of ResNet-20, each rounded to 0.3 of its deviation a step; float32 and
bfloat16 weights without loss. Speeds are the best of ``--repeats`` by the CPU time of one thread, in millions of
numbers and in megabytes of float32 weights a second. ``above`` is how much more the whole stream takes, tables counted,
than the entropy of its tokens in the classes of its own model and the raw bits; ``worst`` the most of any array above
10,000 numbers.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from experiments import flags, tables
from experiments.benchmarks import timing
from experiments.environment import environment
from experiments.models import resnet
from experiments.workdir import write
from jcompress.numeric import coding, models, tokens, walks
from jcompress.numeric.grids import Grid, grid_of

LARGE = 10_000
KINDS = ("raw", "constant", "one table", "rows", "columns", "above", "left", "trellis")
"""Of the models, as a stream names them in its first three bits."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array, and how many bits of each number count."""

    values: np.ndarray
    width: int

    @property
    def grid(self) -> Grid:
        return grid_of(self.values.shape)

    def encoded(self) -> bytes:
        return coding.encode(self.values, self.width, self.grid)

    def decoded(self, data: bytes) -> np.ndarray:
        return coding.decode(memoryview(data), self.values.size, self.width, self.values.dtype, self.grid)[0]

    def entropy(self) -> float:
        """Bits: the least of any way that the coder may choose, by the entropies of its classes."""
        flat, found = self.values.reshape(-1), []
        for split in tokens.splits(flat):
            own = tokens.tokens(flat, split)
            raw = (tokens.raw_widths(split, flat.dtype) * np.bincount(own, minlength=split.symbols)).sum()
            _, model = models.choose(own, split.symbols, self.grid)
            queues = walks.parted(own, self.grid, model, split.low)
            found.append(raw + sum(map(_entropy, [*queues, model.labels])))
        return float(min(found))


def _entropy(queue: np.ndarray) -> float:
    counts = np.bincount(queue)
    counts = counts[counts > 0]
    return float(counts.sum() * np.log2(max(counts.sum(), 1)) - (counts * np.log2(counts)).sum())


def arrays(data_dir: str | None, side: int) -> Mapping[str, list[Array]]:
    """What is coded, by name."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(side, side)).astype(np.float32)
    found = {
        f"Gaussian codes, {side} x {side}": [Array(np.rint(weights / 0.3).astype(np.int8), 8)],
        "bfloat16 weights": [Array((0.02 * weights).astype(ml_dtypes.bfloat16), 16)],
        "float32 weights": [Array(0.02 * weights, 32)],
    }
    if data_dir is not None:
        params, _ = resnet.load(Path(data_dir) / "resnet20_cifar10.npz")
        kernels = [np.asarray(x) for path, x in params.items() if x.ndim > 1]
        name = f"codes of ResNet-20, {len(kernels)} arrays"
        found[name] = [Array(np.rint(w / (0.3 * w.std())).astype(np.int8), 8) for w in kernels]
    return found


def best(call: Callable[[], Any], repeats: int) -> float:
    """The least CPU seconds of so many calls."""
    return min(timing.seconds(call, time.process_time) for _ in range(repeats))


def row(name: str, every: Sequence[Array], repeats: int) -> dict[str, Any]:
    """Speeds and sizes of some arrays, which must come back bit for bit."""
    coded = [x.encoded() for x in every]
    for x, data in zip(every, coded, strict=True):
        if x.decoded(data).tobytes() != x.values.tobytes():
            raise AssertionError(f"{name}: an array of shape {x.values.shape} did not come back")
    numbers, size = sum(x.values.size for x in every), sum(map(len, coded))
    entropies = [x.entropy() for x in every]
    above = [8 * len(data) / e - 1 for x, data, e in zip(every, coded, entropies, strict=True) if x.values.size > LARGE]
    return {
        "name": name,
        "numbers": numbers,
        "bytes": size,
        "models": dict(collections.Counter(KINDS[data[0] >> 5] for data in coded)),
        "of stored": 8 * size / sum(x.width * x.values.size for x in every),
        "encode": numbers / 1e6 / best(lambda: [x.encoded() for x in every], repeats),
        "decode": numbers / 1e6 / best(lambda: [x.decoded(y) for x, y in zip(every, coded, strict=True)], repeats),
        "above": 8 * size / sum(entropies) - 1,
        "worst": max(above, default=0.0),
    }


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table."""
    found = [["", "bytes", "of stored", "M/s", "read", "MB/s of float32", "read", "above", "worst"]]
    for x in rows:
        speeds = [f"{scale * x[way]:.1f}" for scale in (1, 4) for way in ("encode", "decode")]
        sizes = [f"{x['bytes']:,}", f"{x['of stored']:.1%}"]
        found.append([x["name"], *sizes, *speeds, f"{x['above']:.2%}", f"{x['worst']:.2%}"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder with resnet20_cifar10.npz; without, no kernels of ResNet-20")
    parser.add_argument("--side", type=flags.positive, default=1024, help="rows and columns of the large arrays")
    parser.add_argument("--repeats", type=flags.positive, default=9)
    parser.add_argument("--out", default="runs/benchmarks/coder.json", help="the JSON file to write")
    args = parser.parse_args(argv)
    rows = [row(name, every, args.repeats) for name, every in arrays(args.data_dir, args.side).items()]
    print(tables.aligned(cells(rows)))
    settings = {"side": args.side, "repeats": args.repeats}
    record = {"benchmark": "coder", "settings": settings, "environment": environment(), "rows": rows}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write(Path(args.out), json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    timing.one_thread("experiments.benchmarks.coder", sys.argv[1:])
    sys.exit(main())
