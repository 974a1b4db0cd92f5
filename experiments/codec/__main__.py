"""Whole files beside those of NNCodec: bytes at equal loss after training only, and the speed of both coders.

    python -m experiments.codec --data_dir=D --model_dir=M --pruned=F --nncodec=/path/of/its/python

``--nncodec`` is the Python of an environment with ``nncodec`` 2.1.3 (``pip install --no-deps --no-build-isolation``
from source; needs g++, numpy and pybind11); without it only our files are made. ``--pruned`` is a LeNet-300-100 with 5%
of its weights: a file of the stage ``prune`` of ``experiments.pipelines``. Ours: steps by water-filling
(:class:`jcompress.quantize.WaterFilling`), parted among the layers by what each alone does to the outputs, on a trellis
or not, at a price of bits. For each file of NNCodec the smallest of ours is taken that is no further from the dense
network on data held out of training's; both are scored on test data. Speeds are those of one core. ``--tuned`` trains
the biases of ResNets besides, on augmented images, towards the dense network's outputs.

Published for NNCodec by its own measure of the same files: see ``docs/results.md``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jcompress as jc
from experiments import flags, runner, tables
from experiments.codec import networks
from experiments.codec.networks import Network
from experiments.workdir import Row, Rows, write

QUANTIZERS = (-38, -34, -30, -26, -24, -22, -20, -18, -16, -14)
WORKER = Path(__file__).with_name("worker.py")


class Comparison:
    """A row for each file, ours and NNCodec's, as the runner takes them."""

    keys = ("network", "coder", "setting")

    def __init__(self, args: Any) -> None:
        self.workdir, self.python = Path(args.workdir or "runs/codec"), args.nncodec
        self.networks = {x.name: x for x in networks.named(args.networks.split(","), args)}
        self.states = [int(x) for x in args.states.split(",")]
        self.steps, self.prices = ([float(x) for x in text.split(",")] for text in (args.steps, args.prices))
        self.tuned, self.seeds = args.tuned, args.seeds if args.tuned else 1
        if other := [x.name for x in self.networks.values() if self.tuned and not isinstance(x, networks.ResNet)]:
            raise ValueError(f"--tuned={self.tuned} trains biases of ResNets, found {', '.join(other)}")
        self.setting = {"networks": args.networks, "states": self.states, "tuned": args.tuned}
        self._judges = {name: jax.jit(x.divergence) for name, x in self.networks.items()}
        self._made: dict[str, Any] = {}

    def todo(self) -> Iterator[Row]:
        for name in self.networks:
            yield {"network": name, "coder": "none", "setting": "float32"}
            for states in self.states:
                own = [f"{states} states, {step:g}, price {price:g}" for price in self.prices for step in self.steps]
                ours = "ours, biases trained" if self.tuned else "ours"
                ends = [f", seed {seed}" for seed in range(self.seeds)] if self.tuned else [""]
                yield from ({"network": name, "coder": ours, "setting": x + end} for end in ends for x in own)
            if self.python:
                yield from ({"network": name, "coder": "NNCodec", "setting": f"qp {qp}"} for qp in QUANTIZERS)

    def measure(self, rows: Rows, network: str, coder: str, setting: str) -> Row:
        subject = self.networks[network]
        if coder == "none":
            sizes = [x.size for x in jax.tree.leaves(subject.params)]
            return {"bytes": 4 * sum(sizes), **self._judged(subject, subject.params)}
        if coder == "NNCodec":
            return self._by_nncodec(subject, int(setting.split()[1]))
        states, step, price, *seed = re.findall(r"[\d.]+", setting)
        return self._ours(subject, int(states), float(step), float(price), *map(int, seed))

    def _ours(self, subject: Network, states: int, step: float, price: float, seed: int = 0) -> Row:
        parts = self._parts(subject)
        start = time.process_time()
        tree = jax.block_until_ready(subject.compressed(step, price, states, parts))
        tree = subject.tuned(tree, self.tuned, seed) if self.tuned else tree
        fitted, path = time.process_time(), self.workdir / f"{subject.name.replace(' ', '_')}.jc"
        size = jc.save(path, tree, coded=True)
        saved = time.process_time()
        again = jc.load(path)
        loaded = time.process_time()
        seconds = {"fit": fitted - start, "encode": saved - fitted, "decode": loaded - saved}
        return {"bytes": size, "times": seconds, **self._judged(subject, jc.materialize(again))}

    def _parts(self, subject: Network) -> dict[str, float]:
        """Shares of the step, kept with the run."""
        path = self.workdir / f"{subject.name.replace(' ', '_')}.parts.json"
        if not path.exists():
            write(path, json.dumps(networks.shares(subject, self._judges[subject.name])))
        return json.loads(path.read_text())

    def _by_nncodec(self, subject: Network, qp: int) -> Row:
        source, target = self.workdir / "arrays.npz", self.workdir / "nncodec.npz"
        arrays = {path: np.asarray(x, np.float32) for path, x in jc.paths(subject.params)}
        np.savez(source, **arrays)
        subprocess.run([self.python, WORKER, source, target, f"[{qp}]"], check=True, capture_output=True)
        with np.load(target) as found:
            params = jax.tree.unflatten(
                jax.tree.structure(subject.params), [found[f"{qp}/arrays/{path}"] for path in arrays]
            )
            encode, decode = found[f"{qp}/seconds"].tolist()
            size = int(found[f"{qp}/bytes"])
        return {"bytes": size, "times": {"encode": encode, "decode": decode}, **self._judged(subject, params)}

    def _judged(self, subject: Network, params: Any) -> Row:
        held = float(self._judges[subject.name](jax.tree.map(np.asarray, params)))
        return {"held out": held, "score": subject.judged(params)}

    def line(self, row: Row) -> str:
        return f"{row['network']}, {row['coder']} {row['setting']}: {row['bytes']:,} bytes, {row['score']:.4f}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        cells = (table if self.python else files)(rows)
        write(self.workdir / "table.md", tables.markdown(cells) + "\n")
        return tables.aligned(cells), None


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Each file of NNCodec beside the smallest of ours that is no further from the dense network."""
    head = ["network", "NNCodec", "", "ours, no worse on data held out", "", "smaller", "encode, MB/s", "decode, MB/s"]
    found = [head]
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        dense = next(row for row in own if row["coder"] == "none")
        ours, theirs = ([r for r in own if r["coder"] == coder] for coder in ("ours", "NNCodec"))
        for other in theirs or ours:
            near = [row for row in ours if row["held out"] <= other["held out"]]
            best = min(near, key=lambda row: row["bytes"]) if near else None
            found.append([name, *_told(other, dense), *(_told(best, dense) if best else ["none", ""])])
            found[-1] += [f"{other['bytes'] / best['bytes']:.2f}x" if best else ""]
            speeds = [[dense["bytes"] / 1e6 / r["times"][x] for r in (other, best) if r] for x in ("encode", "decode")]
            found[-1] += [" / ".join(f"{x:.1f}" for x in pair) for pair in speeds]
    return found


def files(rows: Sequence[Row]) -> list[list[str]]:
    """Each file by itself, where there are none of NNCodec."""
    found = [["network", "file", "setting", "bytes", "smaller", "score", "change"]]
    for row in rows:
        dense = next(x for x in rows if x["network"] == row["network"] and x["coder"] == "none")
        told = [row["network"], row["coder"], row["setting"], f"{row['bytes']:,}", *_told(row, dense)]
        found.append([*told[:5], f"{row['score']:.4f}", told[5]])
    return found


def _told(row: Row, dense: Row) -> list[str]:
    return [f"{dense['bytes'] / row['bytes']:.2f}x", f"{row['score'] - dense['score']:+.4f}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/codec")
    parser.add_argument("--networks", default="lenet,resnet20,minilm")
    parser.add_argument("--steps", default="0.35,0.5,0.7,1", help="of ours, parts of the outputs' root mean square")
    parser.add_argument("--prices", default="0.01,0.1", help="of a bit, in squared steps")
    parser.add_argument("--states", default="0,8", help="of the trellis; 0 for one quantizer")
    parser.add_argument("--tuned", type=int, default=0, help="steps that train what is no kernel, of ResNets")
    parser.add_argument("--seeds", type=int, default=3, help="of the order of the images that they see")
    parser.add_argument("--model_dir", help="folder with the weights of all-MiniLM-L6-v2")
    parser.add_argument("--pruned", help="file with the pruned LeNet-300-100")
    parser.add_argument("--nncodec", help="the Python that has NNCodec")
    args = parser.parse_args(argv)
    return runner.main(lambda signals: Comparison(args), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
