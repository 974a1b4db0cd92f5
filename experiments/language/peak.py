"""Seconds and memory of compressing a decoder layer by layer, in a process of its own.

    python -m experiments.language.peak --model=<file.gguf> --data_dir=<folder with wikitext2_valid.txt> --row=gptq3

``--row`` is one of ``experiments/configs/llm.py``. Statistics are gathered a layer at a time and wait on disk; a layer
is compressed by its own, packed, and its dense weights are let go. Resident memory is that of the process above what it
held when all was imported and before the model was read. What XLA compiles is in it, and told apart: statistics and
methods run on a first layer before, so that their programs are there, whose size is that of no model. It prints a
table, and writes it with its settings as JSON to ``--workdir``.

``malloc`` keeps much of what is freed; with ``MALLOC_MMAP_THRESHOLD_=1000000`` in front of the command it gives it
back.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import jcompress as jc
from experiments import flags, llm, tables
from experiments.configs import llm as config_file
from experiments.configs.llm import Config, Recipe
from experiments.environment import environment
from experiments.language import memory, text
from experiments.language.calibration import Calibration
from experiments.runner import refuse
from experiments.workdir import Row, write


class Stages:
    """Rows of what was run, one after the other.

    Attributes:
      rows: seconds, and bytes at most and afterwards, above those at the beginning, and those of programs in them.
    """

    def __init__(self) -> None:
        jax.block_until_ready(jax.numpy.ones(8) + 1)
        self.base, self.rows = memory.Peak().before, []

    def __call__(self, name: str, run: Callable[[], Any], first: Callable[[], Any] | None = None) -> Any:
        """What ``run`` gives, with the programs that ``first`` compiles."""
        empty, start = memory.Peak().before, time.monotonic()
        if first is not None:
            jax.block_until_ready(first())
        peak = memory.Peak(compiled=True)
        found = jax.block_until_ready(run())
        seconds, most = time.monotonic() - start, peak.bytes()
        after = memory.Peak().before
        row = {"stage": name, "seconds": seconds, "programs": peak.before - empty}
        self.rows.append(row | {"peak": most - self.base, "after": after - self.base})
        return found


def measured(model: str, data_dir: str | None, config: Config, recipe: Recipe, folder: Path) -> tuple[list[Row], int]:
    """The stages of one recipe, and the bytes of the model."""
    stage = Stages()
    loaded = stage("load", lambda: llm.loaded(model))
    dense = sum(4 * x.size for x in jax.tree.leaves(loaded.params))
    tokens = llm.tokens_of(loaded, data_dir)
    windows = text.windows(tokens, config.calibration_length, config.calibration, "first")
    calibration = Calibration(loaded.params, loaded.config, windows, folder / "statistics")
    layers = loaded.params["layers"]
    if any("stats" in need for need in jc.core.needs(recipe.kernels)):
        few = Calibration({**loaded.params, "layers": layers[:1]}, loaded.config, windows[:1], folder / "first")
        stage("statistics", lambda: calibration.stats(recipe.kind, 0), lambda: few.stats(recipe.kind, 0))

    def compress(count: int, keep: bool = False) -> list[Any]:
        made = []
        for i, node in zip(range(count), calibration.compressed(recipe.rules(), recipe.kind), strict=False):
            made.append(jax.block_until_ready(jc.pack(node)))
            layers[i] = layers[i] if keep else None
        return made

    packed = stage("compress", lambda: compress(len(layers)), lambda: compress(2, keep=True))
    stage("save", lambda: jc.save(folder / "layers.jc", packed))
    return stage.rows, dense


def table(rows: Sequence[Row], dense: int) -> str:
    """Megabytes, and their share of the float32 model's."""
    cells = [["stage", "seconds", "peak MB", "of the float32 model", "without programs", "afterwards MB"]]
    for r in rows:
        parts = [f"{x / dense:.2f}" for x in (r["peak"], r["peak"] - r["programs"])]
        cells.append([r["stage"], f"{r['seconds']:.1f}", f"{r['peak'] / 1e6:.0f}", *parts, f"{r['after'] / 1e6:.0f}"])
    return tables.markdown(cells)


def main(argv: Sequence[str] | None = None) -> int:
    config = config_file.get_config()
    recipes = {recipe.name: recipe for recipe in config.recipes if recipe.kernels and not recipe.healing}
    parser = flags.parser(__doc__, "runs/peak")
    parser.add_argument("--model", required=True, help="a GGUF file, a folder of the hub, or tiny")
    parser.add_argument("--row", default="gptq3", choices=list(recipes))
    args = parser.parse_args(argv)
    folder = Path(args.workdir or "runs/peak")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows, dense = measured(args.model, args.data_dir, config, recipes[args.row], folder)
    except (ValueError, OSError, ImportError) as problem:
        return refuse(problem)
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    record = {"row": args.row, "float32_bytes": dense, "mmap_threshold": threshold, "environment": environment()}
    write(folder / f"peak_{args.row}.json", json.dumps(record | {"rows": rows}, indent=1) + "\n")
    print(table(rows, dense))
    return 0


if __name__ == "__main__":
    sys.exit(main())
