"""One network pruned in many ways at one training budget: score against sparsity.

Examples:
  python -m experiments.prune
  python -m experiments.prune --config.data=mnist --data_dir=<folder with MNIST's idx files>
  python -m experiments.prune --config.data=text --data_dir=<folder with tinyshakespeare.txt>
  python -m experiments.prune --config.ways="('random','RigL')" --config.seeds=5

It writes ``results.jsonl``, ``table.md``, ``curve.png`` and ``record.json`` to ``--workdir``. Interrupted, the same
command continues. ``experiments/pruning/ways.py`` has the ways, ``experiments/pruning/lab.py`` the budget.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import data as datasets
from experiments import pictures, runner, tables
from experiments.pruning.expectations import EXPECTED
from experiments.pruning.lab import Config, Lab
from experiments.pruning.ways import WAYS, dense
from experiments.runner import Way
from experiments.workdir import Row, Rows, write

DENSE = Way("dense", dense)
Cells = dict[tuple[str, float], tuple[float, float, int]]


def config_of(data: str) -> Config:
    """That of the digits is the default, those of other data stand in ``experiments/configs``."""
    if data == "digits":
        return Config()
    if data not in ("mnist", "text"):
        raise LookupError(data)
    return importlib.import_module(f"experiments.configs.pruning_{data}").get_config()


class Pruning:
    """All models, seeds, ways and sparsities of one config, as the runner takes them.

    Raises:
      ValueError: for anything wrong with the config or the data.
    """

    keys = ("model", "seed", "way", "sparsity")

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None) -> None:
        check(config)
        self.config, self.workdir = config, Path(workdir or f"runs/pruning/{config.name}")
        known = {way.name: way for way in WAYS}
        self.ways = {way.name: way for way in (DENSE, *(known[name] for name in config.ways or known))}
        load = functools.partial(datasets.of, config.data, data_dir, config.data_options)
        self.labs = {model: Lab(model, config, load) for model in config.models}
        self.about, self.kind = str(load(0)), load(0).kind
        skipped = ("name", "ways", "sparsities", "seeds", "models")
        setting = {k: v for k, v in dataclasses.asdict(config).items() if k not in skipped}
        self.setting = {"config": setting, "checksum": load(0).checksum()}

    def todo(self) -> Iterator[Row]:
        for model in self.labs:
            for seed in range(self.config.seeds):
                for way in self.ways:
                    for sparsity in (0.0,) if way == DENSE.name else self.config.sparsities:
                        yield {"model": model, "seed": seed, "way": way, "sparsity": sparsity}

    def measure(self, rows: Rows, model: str, seed: int, way: str, sparsity: float) -> Row:
        lab = self.labs[model]
        return lab.score(self.ways[way].make(lab, seed, sparsity), seed)

    def line(self, row: Row) -> str:
        about = f"{row['model']} seed {row['seed']} {row['way']} {row['sparsity']:g}"
        return f"{about}: {score(row, self.kind):.2f}, {row['kept']} of {row['of']}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return finish(rows, self.kind, self.workdir / "table.md", self.workdir / "curve.png", self.about), None


def check(config: Config) -> None:
    """Raise for what cannot be run."""
    known = [way.name for way in WAYS]
    unknown = [way for way in config.ways if way not in known]
    if unknown:
        raise ValueError(f"config.ways: {unknown[0]!r} is unknown; use some of {', '.join(known)}")
    if not all(0 < s < 1 for s in config.sparsities):
        raise ValueError(f"config.sparsities={config.sparsities} must lie between 0 and 1")
    if not config.seeds > 0:
        raise ValueError(f"config.seeds={config.seeds} must be positive")
    for model in config.models:
        if model not in config.steps or model not in config.batch_size:
            raise ValueError(f"config.steps and config.batch_size need an entry for model {model!r}")


def score(row: Row, kind: str) -> float:
    """Test accuracy in percent, or bits per byte."""
    return row["test_bits"] if kind == "text" else 100 * row["test_accuracy"]


def cells(rows: Iterable[Row], kind: str) -> Cells:
    """Mean, standard deviation and number of seeds, by way and sparsity."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        found.setdefault((row["way"], row["sparsity"]), []).append(score(row, kind))
    every = {key: (*tables.mean_std(values), len(values)) for key, values in found.items()}
    return {key: (mean, std or 0.0, count) for key, (mean, std, count) in every.items()}


def finish(rows: Sequence[Row], kind: str, table: Path, picture: Path, title: str) -> str:
    """Write the table and the picture; return the table."""
    text = markdown(rows, kind)
    write(table, text + "\n")
    families = {way.name: way.family for way in WAYS}
    by_model = {model: cells([r for r in rows if r["model"] == model], kind) for model in _models(rows)}
    pictures.pruned(by_model, families, kind, picture, title)
    return text


def _models(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def markdown(rows: Sequence[Row], kind: str) -> str:
    """One table for each model, the ways in the order in which they were run."""
    unit = "bits per byte, lower is better" if kind == "text" else "test accuracy in percent"
    sparsities = sorted({row["sparsity"] for row in rows} - {0.0})
    parts = []
    for model in _models(rows):
        mine = [row for row in rows if row["model"] == model]
        found = cells(mine, kind)
        seeds = max(count for *_, count in found.values())
        head = ["", *(f"{100 * s:g}%" for s in sparsities), "the literature leads one to expect"]
        shown = [head]
        if (DENSE.name, 0.0) in found:
            shown.append(["dense", _cell(found, DENSE.name, 0.0, kind), *[""] * len(sparsities)])
        for way in dict.fromkeys(row["way"] for row in mine if row["way"] != DENSE.name):
            shown.append([way, *(_cell(found, way, s, kind) for s in sparsities), EXPECTED.get(way, "")])
        table = tables.markdown(shown, range(len(head)))
        parts.append(f"**{model}**: {unit}, mean ± standard deviation over {seeds} seeds.\n\n{table}")
    return "\n\n".join(parts)


def _cell(found: Mapping[tuple[str, float], Any], way: str, sparsity: float, kind: str) -> str:
    if (way, sparsity) not in found:
        return ""
    mean, std, _ = found[way, sparsity]
    return tables.spread(mean, std, 2 if kind == "text" else 1)


def main(argv: Sequence[str] | None = None) -> int:
    return runner.of_config(__doc__, "runs/pruning/<name of the config>", config_of, Pruning, argv)


if __name__ == "__main__":
    sys.exit(main())
