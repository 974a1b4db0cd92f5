"""The most memory that ``jc.compress_file`` holds, as a multiple of one array of the file.

    python -m experiments.scale.streaming

A file of six random arrays, (4096, 4096), is compressed array by array, each method and dtype in a process of its own
(Linux), which compiled before; memory is what is resident at most above that before. ``malloc`` gives back at once what
is freed. Rows are added to ``results/scale/streaming.jsonl`` and never measured twice; the table stands beside them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments import tables
from experiments.language import memory
from experiments.scale.verbs import RESULTS
from experiments.workdir import Row, Rows, write

METHODS = {
    "8 bits": jc.quantize.Int(bits=8),
    "4 bits, groups of 128": jc.quantize.Int(bits=4, group_size=128),
    "magnitude": jc.prune.Magnitude(sparsity=0.7),
    "2:4": jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)),
    "16 values": jc.share.KMeans(16),
}
DTYPES = ("float32", "bfloat16")
SIDE, COUNT = 4096, 6


def measure(method: str, dtype: str, folder: Path, side: int = SIDE, count: int = COUNT) -> float:
    """In this process: the peak as a multiple of an array."""
    size = written(folder / "one", dtype, side, 1)
    written(folder / "many", dtype, side, count)
    compress(method, folder / "one")
    peak = memory.Peak(compiled=True)
    compress(method, folder / "many")
    return (peak.bytes() - peak.before) / size


def written(path: Path, dtype: str, side: int, count: int) -> int:
    """A file of so many arrays; the bytes of one."""
    rows = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), dtype))
    shapes = {f"w{i}": jax.ShapeDtypeStruct(rows.shape, rows.dtype) for i in range(count)}
    jc.io.write_safetensors(path, jc.io.Tensors(shapes, lambda name, start, stop: rows[start:stop]))
    return rows.nbytes


def compress(method: str, path: Path) -> None:
    source = jc.io.read_tensors(path)
    jc.compress_file(source, jc.plan(source.tree, [(".*", METHODS[method])]), path.with_suffix(".jc"))


def elsewhere(method: str, dtype: str) -> float:
    """In a process of its own."""
    command = [sys.executable, "-m", "experiments.scale.streaming", "--row", method, dtype]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "JAX_PLATFORMS": "cpu"}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def finish(rows: Sequence[Row], path: Path) -> str:
    """Write the table; return it."""
    found = {(r["method"], r["dtype"]): r["arrays"] for r in rows}
    cells = [["method", *DTYPES]]
    for method in METHODS:
        own = [found.get((method, dtype)) for dtype in DTYPES]
        cells.append([method, *("" if x is None else f"{x:.2f}" for x in own)])
    text = tables.markdown(cells) + "\n"
    write(path, text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--row", nargs=2, help="a method and a dtype, measured in this process")
    args = parser.parse_args(argv)
    if args.row:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(*args.row, Path(folder)))
        return
    args.results.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.results / "streaming.jsonl", ("method", "dtype"))
    for method in METHODS:
        for dtype in DTYPES:
            if rows.find(method=method, dtype=dtype) is None:
                rows.add({"method": method, "dtype": dtype, "arrays": round(elsewhere(method, dtype), 3)})
    print(finish(list(rows), args.results / "streaming.md"))


if __name__ == "__main__":
    main()
