"""One trained network, made small by every family: score before and after equal fine-tuning, bytes, multiply-adds.

Examples:
  python -m experiments.families
  python -m experiments.families --config.data=mnist --data_dir=<folder with MNIST's idx files>
  python -m experiments.families --config.data=text --data_dir=<folder with tinyshakespeare.txt>
  python -m experiments.families --config.data=cifar10 --data_dir=<folder with CIFAR-10 and resnet20_cifar10.npz>
  python -m experiments.families --config.data=sts --data_dir=<folder with sentences.txt, the pairs of STS, minilm>

It writes ``results.jsonl``, ``table.md``, ``curve.png`` and ``record.json`` to ``--workdir``. Interrupted, the same
command continues. ``experiments/families/ways.py`` has the families, ``experiments/families/lab.py`` what they share.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import pictures, runner, tables
from experiments.families.encoder import Sentences
from experiments.families.lab import Config, Lab, Pretrained
from experiments.families.ways import FAMILIES, LAYERED
from experiments.workdir import Row, Rows, write


def config_of(data: str) -> Config:
    """That of the digits is the default, those of other data stand in ``experiments/configs``."""
    if data == "digits":
        return Config()
    if data not in ("mnist", "text", "cifar10", "sts"):
        raise LookupError(data)
    return importlib.import_module(f"experiments.configs.families_{data}").get_config()


def lab_of(config: Config, data_dir: str | None) -> Lab:
    """The lab of a config."""
    kind = Sentences if config.model == "minilm" else Pretrained if config.model.startswith("resnet") else Lab
    return kind(config, data_dir)


class Comparison:
    """All families, points and seeds of one config, as the runner takes them.

    Raises:
      ValueError: for anything wrong with the config or the data.
    """

    keys = ("seed", "way", "point")

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None) -> None:
        known = {family.name: family for family in FAMILIES}
        for name in config.ways:
            if name not in known:
                raise ValueError(f"config.ways: {name!r} is unknown; use some of {', '.join(known)}")
        if not config.seeds > 0:
            raise ValueError(f"config.seeds={config.seeds} must be positive")
        self.config, self.workdir = config, Path(workdir or f"runs/families/{config.name}")
        self.families = [known[name] for name in config.ways or known if config.ways or name not in LAYERED]
        self.lab = lab_of(config, data_dir)
        setting = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("name", "ways", "seeds")}
        self.setting = {"config": setting, "checksum": self.lab.load(0).checksum()}
        self._tree: Any = None

    def todo(self) -> Iterator[Row]:
        for seed in range(self.config.seeds):
            for family in self.families:
                for point in family.points:
                    yield {"seed": seed, "way": family.name, "point": point}

    def measure(self, rows: Rows, seed: int, way: str, point: Any) -> Row:
        family = next(family for family in self.families if family.name == way)
        network = family.make(self.lab, seed, point)
        row: Row = {f"{name}_before": value for name, value in self.lab.score(network, seed).items()}
        row |= self.lab.size(network)
        return row | self.lab.score(self.lab.finetuned(network, seed), seed)

    def line(self, row: Row) -> str:
        before, after = (score(row, self.lab.kind, x) for x in ("_before", ""))
        size = f"{row['bytes']:,} bytes, {row['multiply_adds']:,.0f} multiply-adds"
        return f"seed {row['seed']} {row['way']} {row['point']:g}: {before:.2f}, {after:.2f} fine-tuned, {size}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        title = f"{self.config.model}, {self.lab.about}"
        places = self.workdir / "table.md", self.workdir / "curve.png"
        return finish(rows, self.lab.kind, self.config.finetuning, *places, title), None


def finish(rows: Sequence[Row], kind: str, steps: int, table: Path, picture: Path, title: str) -> str:
    """Write the table and the picture; return the table."""
    found = cells(rows, kind)
    text = markdown(found, kind, steps)
    write(table, text + "\n")
    pictures.families(found, kind, picture, title)
    return text


def score(row: Row, kind: str, when: str = "") -> float:
    """Test error in percent, bits per byte, or what a rank correlation lacks in hundredths."""
    if kind == "pairs":
        return 100 * (1 - row[f"test_spearman{when}"])
    return row[f"test_bits{when}"] if kind == "text" else 100 * (1 - row[f"test_accuracy{when}"])


def cells(rows: Sequence[Row], kind: str) -> list[Row]:
    """Means and deviations over seeds, by way and point in the order of the rows."""
    groups = {family.name: family.group for family in FAMILIES}
    found = []
    for way, point in dict.fromkeys((row["way"], row["point"]) for row in rows):
        own = [row for row in rows if (row["way"], row["point"]) == (way, point)]
        sizes = {name: sum(row[name] for row in own) / len(own) for name in ("bytes", "multiply_adds")}
        before, after = (tables.mean_std([score(row, kind, when) for row in own]) for when in ("_before", ""))
        found.append(
            {
                "way": way,
                "group": groups[way],
                "point": point,
                "seeds": len(own),
                "before": before,
                "after": after,
                **sizes,
            }
        )
    return found


def markdown(found: Sequence[Row], kind: str, steps: int) -> str:
    """The table: a line a point."""
    told, digits = {family.name: family.told for family in FAMILIES}, 3 if kind == "text" else 2
    unit = pictures.UNITS[kind]
    shown = [["family", "point", "bytes", "multiply-adds", f"{unit}: as it is", f"after {steps} steps"]]
    for row in found:
        point = f"{row['point']:g} {told[row['way']]}" if row["way"] != "dense" else told["dense"]
        sizes = [f"{row['bytes']:,.0f}", f"{row['multiply_adds']:,.0f}"]
        shown.append([row["way"], point, *sizes, *(tables.spread(*row[when], digits) for when in ("before", "after"))])
    seeds = max(row["seeds"] for row in found)
    below = f"Mean ± standard deviation over {seeds} seeds. Bytes are those of the file; multiply-adds of one example, "
    return tables.markdown(shown, (0, 1)) + f"\n\n{below}zeros skipped and factors applied in turn."


def main(argv: Sequence[str] | None = None) -> int:
    return runner.of_config(__doc__, "runs/families/<name of the config>", config_of, Comparison, argv)


if __name__ == "__main__":
    sys.exit(main())
