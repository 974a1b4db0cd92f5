"""A pretrained sentence encoder, quantized in many ways: stored bytes against agreement with human judgement.

Examples:
  python -m experiments.minilm --model_dir=<folder with model.safetensors> --data_dir=<folder with sts2015_images.tsv>
  python -m experiments.minilm --model_dir=... --data_dir=... --config.only=int8,gptq4

It writes to ``--workdir``: ``results.jsonl``, ``table.txt``, ``table.md``, ``pareto.png``, ``record.json`` and the
compressed models. Interrupted, the same command continues: rows that are finished are not made again.
``experiments/configs/minilm.py`` has the ways.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jcompress as jc
from experiments import flags, pictures, runner, tables
from experiments.configs import minilm as config_file
from experiments.models import minilm
from experiments.quantization import recipes, sts
from experiments.quantization.recipes import Calibration, Config
from experiments.runner import Way, describe
from experiments.workdir import Row, Rows, write
from jcompress.io import load, save

DENSE = Way("dense", lambda calibration, seed: calibration.params, lambda calibration: "float32", family="dense")


class Encoding:
    """All rows of one config, as the runner takes them.

    A row is a way to compress, or under the name of a width the errors of each kernel's outputs by two methods.

    Raises:
      ValueError: for anything wrong with the config or the data.
      FileNotFoundError: if weights or pairs are missing.
    """

    keys = ("name",)

    def __init__(self, config: Config, model_dir: str, data_dir: str, workdir: str | None = None) -> None:
        self.config, self.workdir = config, Path(workdir or f"runs/{config.name}")
        self.encoder, params = minilm.load(model_dir)
        sets = {name: sts.read(Path(data_dir) / f"sts2015_{name}.tsv", self.encoder) for name in config.sets}
        self.labelled, free = sts.labelled(sets), sts.unlabelled(sets)
        drawn = np.zeros(len(free), bool)
        drawn[np.random.default_rng(0).permutation(len(free))[: config.validation]] = True
        self.validation, rest = free.where(drawn), free.where(~drawn)
        self.calibration = Calibration(
            self.encoder, params, [*rest.first, *rest.second], config.calibration, config.calibration_length
        )
        self.ways = {way.name: way for way in (DENSE, *runner.chosen(config.ways, config.only))}
        self.judge = sts.Judge(self.encoder)
        self._dense: dict[str, np.ndarray] = {}
        skipped = ("name", "only", "ways", "widths")
        self.setting = {k: describe(v) for k, v in vars(config).items() if k not in skipped}
        self.setting["ways"] = {way.name: way.told(self.calibration) for way in (DENSE, *config.ways)}

    def todo(self) -> Iterator[Row]:
        yield from ({"name": name} for name in (*self.ways, *self.config.widths))

    def measure(self, rows: Rows, name: str) -> Row:
        """Compress, store, load what was stored, and judge that."""
        if name not in self.ways:
            pair = self.config.widths[name]
            return {"errors": {which: recipes.output_errors(self.calibration, m) for which, m in pair.items()}}
        way, path = self.ways[name], self.workdir / "models" / f"{name}.jc"
        path.parent.mkdir(exist_ok=True)
        save(path, way.make(self.calibration, 0), metadata={"row": name})
        params = jc.materialize(load(path))
        count = sum(x.size for x in jax.tree.leaves(self.calibration.params))
        size = path.stat().st_size
        row = {"group": way.family, "bytes": size, "ratio": 4 * count / size, "bits": 8 * size / count}
        return row | self._judged(params)

    def _judged(self, params: Any) -> Row:
        """Agreement with human judgement, and with the dense encoder."""
        found = self._embedded(params)
        self._dense = self._dense or self._embedded(self.calibration.params)
        row: Row = {key: sts.spearman(found[key], pairs.scores) for key, pairs in self.labelled.items()}
        row["mean"] = float(np.mean(list(row.values())))
        every = [np.concatenate([x[key] for key in self.labelled]) for x in (found, self._dense)]
        validation = sts.agreement(found["validation"], self._dense["validation"])
        return {**row, "cosine": sts.agreement(*every)["cosine"], "validation": validation}

    def _embedded(self, params: Any) -> dict[str, np.ndarray]:
        every = {**self.labelled, "validation": self.validation}
        return {name: self.judge.pairs(params, pairs) for name, pairs in every.items()}

    def line(self, r: Row) -> str:
        if "errors" in r:
            return f"errors of outputs, {r['name']}"
        size = f"{r['bytes']:>11,} bytes {r['ratio']:6.2f}x"
        return f"{r['name']:<24} {size}  mean {r['mean']:.4f}  cosine {r['cosine']:.4f}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        text = finish(rows, self.workdir / "table.md", self.workdir / "pareto.png")
        write(self.workdir / "table.txt", text + "\n")
        return text, None


def finish(rows: Sequence[Row], table: Path, picture: Path) -> str:
    """Write the table of ways and the picture; return all tables."""
    ways, widths = ([r for r in rows if ("errors" in r) == layered] for layered in (False, True))
    text = "\n\n".join([tables.aligned(cells(ways)), *(tables.aligned(layer_cells(r)) for r in widths)])
    write(table, tables.markdown(cells(ways)) + "\n")
    pictures.encoders(ways, picture)
    return text


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table, the head first."""
    sets = [key for key in ("images", "headlines") if key in rows[0]]
    size = ["bytes", "ratio", "bits a weight"]
    found = [["row", *size, *sets, "mean", "vs dense", "cosine", "validation cosine", "seconds"]]
    for r in rows:
        scores = [f"{r[s]:.4f}" for s in (*sets, "mean")]
        change = f"{r['mean'] - rows[0]['mean']:+.4f}"
        size = [f"{r['bytes']:,}", f"{r['ratio']:.2f}x", f"{r['bits']:.2f}"]
        near = [f"{r['cosine']:.4f}", f"{r['validation']['cosine']:.4f}"]
        found.append([r["name"], *size, *scores, change, *near, f"{r['seconds']:.0f}"])
    return found


def layer_cells(row: Row) -> list[list[str]]:
    """The part of the squared outputs of each kernel that each method changes."""
    errors = row["errors"]
    head = [f"{row['name']}: tr(dW^T H dW) / tr(W^T H W)", *errors]
    paths = next(iter(errors.values()))
    return [head, *[[path, *(f"{errors[m][path]:.2e}" for m in errors)] for path in paths]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/<name of the config>")
    parser.add_argument("--model_dir", required=True, help="folder with the weights of all-MiniLM-L6-v2")
    args, config = flags.parse(parser, lambda data: config_file.get_config(), argv)
    if args.data_dir is None:
        parser.error("--data_dir is required, a folder with the pairs of sentences")
    return runner.main(lambda signals: Encoding(config, args.model_dir, args.data_dir, args.workdir), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
