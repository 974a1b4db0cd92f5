"""All rows of one config of the sentence encoder, in a folder of their own, continued where they were interrupted."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import jcompress as jc
from experiments.models import minilm
from experiments.quantization import recipes, selfdistill, sts
from experiments.runs import Record, Results, Signals
from experiments.stages import describe
from jcompress import measure
from jcompress.io import load, save

DENSE = "dense"


class Run:
    """All rows of one config, those that are done and those to do.

    Args:
      config: see ``experiments/configs/quantization``.
      model_dir: the folder of the weights.
      data_dir: the folder of the pairs.
      workdir: where to write.
      overwrite: whether to delete an earlier run.

    Raises:
      ValueError: for anything wrong with the config, the data or the folder.
      FileNotFoundError: if weights or pairs are missing.
    """

    def __init__(
        self, config: ConfigDict, model_dir: str, data_dir: str, workdir: str | None = None, overwrite: bool = False
    ) -> None:
        self.config = config
        self.encoder, self.params = minilm.load(model_dir)
        sets = {name: sts.read(Path(data_dir) / f"sts2015_{name}.tsv", self.encoder) for name in config.sets}
        self.labelled, free = sts.labelled(sets), sts.unlabelled(sets)
        chosen = np.zeros(len(free), bool)
        chosen[np.random.default_rng(0).permutation(len(free))[: config.validation]] = True
        self.validation, fit = free.where(chosen), free.where(~chosen)
        self.tokens = [*fit.first, *fit.second]
        self.recipes: dict[str, recipes.Recipe] = config.recipes(self.params)
        self.names = self._chosen()
        self.workdir = Path(workdir or f"runs/{config.name}")
        self.record = Record(self.workdir, self._setting(), overwrite)
        self.results = Results(self.workdir / "results.jsonl")
        self.layers = Results(self.workdir / "layers.jsonl")
        (self.workdir / "models").mkdir(exist_ok=True)
        self.calibration = recipes.Calibration(
            self.encoder, self.params, self.tokens, config.calibration, config.calibration_length
        )
        self.judge = sts.Judge(self.encoder)
        self._dense: dict[str, np.ndarray] = {}

    def _chosen(self) -> list[str]:
        names = [name.strip() for name in self.config.only.split(",") if name.strip()] or list(self.recipes)
        for name in names:
            if name not in self.recipes:
                raise ValueError(f"config.only: row {name!r} is unknown; use some of {','.join(self.recipes)}")
        return names

    def _setting(self) -> dict[str, Any]:
        """What decides the results of all rows, as JSON values; a row carries its own recipe."""
        skipped = ("name", "only", "recipes", "widths")
        return {k: describe(v, 0) for k, v in self.config.to_dict().items() if k not in skipped}

    def run(self, signals: Signals) -> None:
        """Make every row that is not in ``results.jsonl`` yet."""
        todo = [DENSE, *self.names]
        for number, name in enumerate(todo, 1):
            signals.check()
            about = "float32" if name == DENSE else describe(self.recipes[name], 0)
            old = self.results.find(name=name)
            if old is not None and old["recipe"] != about:
                raise ValueError(f"{self.workdir} holds a row {name!r} of another recipe; give another --workdir")
            if old is None:
                self.results.add({**self.measure(name), "recipe": about})
                tqdm.write(f"[{number}/{len(todo)}] {line(self.results.rows[-1])}")
                sys.stdout.flush()
        for name, pair in self.config.widths(self.params).items():
            signals.check()
            if self.layers.find(name=name) is None:
                found = {which: recipes.output_errors(self.calibration, m) for which, m in pair.items()}
                self.layers.add({"name": name, **found})

    def measure(self, name: str) -> dict[str, Any]:
        """One row: compress, store, load what was stored, and judge that."""
        start, path = time.monotonic(), self.workdir / "models" / f"{name}.jc"
        group = DENSE
        if name == DENSE:
            tree = self.params
        else:
            recipe, group = self.recipes[name], self.recipes[name].group
            tree = self.calibration.compress(recipe, jax.random.key(0))
            if recipe.training is not None:
                tree = selfdistill.train(self.encoder, self.params, tree, self.tokens, recipe.training)
        save(path, tree, metadata={"row": name})
        params = jc.materialize(load(path))
        count = sum(x.size for x in jax.tree.leaves(self.params))
        row = {"name": name, "group": group, "bytes": path.stat().st_size}
        row |= {"ratio": 4 * count / row["bytes"], "bits": 8 * row["bytes"] / count}
        found = {name: self.judge.pairs(params, pairs) for name, pairs in self._all().items()}
        self._dense = self._dense or (found if name == DENSE else self._embed_dense())
        for key, pairs in self.labelled.items():
            row[key] = sts.spearman(found[key], pairs.scores)
        row["mean"] = float(np.mean([row[key] for key in self.labelled]))
        every = [np.concatenate([x[key] for key in self.labelled]) for x in (found, self._dense)]
        row["cosine"] = sts.agreement(*every)["cosine"]
        row["validation"] = sts.agreement(found["validation"], self._dense["validation"])
        return {**row, "seconds": round(time.monotonic() - start, 1)}

    def _all(self) -> dict[str, sts.Pairs]:
        return {**self.labelled, "validation": self.validation}

    def _embed_dense(self) -> dict[str, np.ndarray]:
        return {name: self.judge.pairs(self.params, pairs) for name, pairs in self._all().items()}

    def finish(self) -> str:
        """Write the table, the picture and the record; return the table."""
        rows = [row for name in [DENSE, *self.recipes] if (row := self.results.find(name=name)) is not None]
        text = "\n\n".join([table(rows, tuple(self.labelled)), *map(layer_table, self.layers.rows)])
        (self.workdir / "table.txt").write_text(text + "\n")
        (self.workdir / "table.md").write_text(markdown(rows, tuple(self.labelled)) + "\n")
        points = [measure.Point(r["name"], r["bytes"], 100 * r["mean"], group=r["group"]) for r in rows]
        lowest = 100 * rows[0]["mean"] - 6
        measure.pareto(
            points, self.workdir / "pareto.png", baseline=DENSE, score_name="mean Spearman x 100", lowest=lowest
        )
        self.record.save(finished=True)
        return f"{text}\n\nwritten to {self.workdir}"


def cells(rows: Sequence[dict[str, Any]], sets: Sequence[str]) -> list[list[str]]:
    """The table, the head first."""
    head = [
        "row",
        "bytes",
        "ratio",
        "bits a weight",
        *sets,
        "mean",
        "vs dense",
        "cosine",
        "validation cosine",
        "seconds",
    ]
    found = [head]
    for r in rows:
        scores = [f"{r[s]:.4f}" for s in (*sets, "mean")]
        change = f"{r['mean'] - rows[0]['mean']:+.4f}"
        size = [f"{r['bytes']:,}", f"{r['ratio']:.2f}x", f"{r['bits']:.2f}"]
        near = [f"{r['cosine']:.4f}", f"{r['validation']['cosine']:.4f}"]
        found.append([r["name"], *size, *scores, change, *near, f"{r['seconds']:.0f}"])
    return found


def table(rows: Sequence[dict[str, Any]], sets: Sequence[str]) -> str:
    """Aligned columns."""
    return _aligned(cells(rows, sets))


def _aligned(found: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    pairs = [list(zip(row, widths, strict=True)) for row in found]
    return "\n".join("  ".join([f"{x:<{w}}", *(f"{y:>{v}}" for y, v in rest)]) for (x, w), *rest in pairs)


def markdown(rows: Sequence[dict[str, Any]], sets: Sequence[str]) -> str:
    """The table in Markdown."""
    head, *body = cells(rows, sets)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def layer_table(row: dict[str, Any]) -> str:
    """The part of the squared outputs of each kernel that each method changes."""
    methods = [key for key in row if key != "name"]
    head = [f"{row['name']}: tr(dW^T H dW) / tr(W^T H W)", *methods]
    return _aligned([head, *[[path, *(f"{row[m][path]:.2e}" for m in methods)] for path in row[methods[0]]]])


def line(r: dict[str, Any]) -> str:
    """One row, as it is made."""
    return f"{r['name']:<24} {r['bytes']:>11,} bytes {r['ratio']:6.2f}x  mean {r['mean']:.4f}  cosine {r['cosine']:.4f}"
