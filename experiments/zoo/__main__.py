"""Read models of other packages in every way, and write what came out as rows and as a table.

    pip install -e ".[zoo]"
    python -m experiments.zoo
    python -m experiments.zoo --only "GPT-2,keras,transformers/ResNet"

Each model is small, made without a download, with every leaf random. A model that is there already is not read again
unless it is named; one whose package is missing is left out. ``pytest --zoo`` fails where a row says that a reading is
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax

from experiments import flags
from experiments.environment import version
from experiments.runner import refuse
from experiments.workdir import Row, write
from experiments.zoo import ENTRIES, tables
from experiments.zoo.model import Entry
from experiments.zoo.readings import READINGS

ROWS = Path(__file__).parent.parent.parent / "results" / "zoo" / "models.jsonl"


def read(entry: Entry) -> Row:
    """All readings of a model; what is wrong is told, and the others go on."""
    model, start = entry.build(), time.monotonic()
    row: Row = {"package": entry.package, "model": entry.name, "version": version(entry.package)}
    row |= {"jax": jax.__version__, "parameters": sum(x.size for x in jax.tree.leaves(model.params)), "wrong": {}}
    for name, reading in READINGS.items():
        try:
            row |= reading(model)
        except Exception as error:
            traceback.print_exc(limit=-4)
            row["wrong"][name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    jax.clear_caches()
    return row | {"seconds": round(time.monotonic() - start, 1)}


def chosen(only: str) -> list[Entry]:
    """Those named, or all.

    Raises:
      ValueError: for a name that none has.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {name for entry in ENTRIES for name in _names(entry)}
    for name in names:
        if name not in known:
            raise ValueError(f"--only: {name!r} is no model and no package; use some of {', '.join(sorted(known))}")
    return [entry for entry in ENTRIES if not names or not _names(entry).isdisjoint(names)]


def _names(entry: Entry) -> set[str]:
    return {entry.name, entry.package, f"{entry.package}/{entry.name}"}


def run(path: Path, only: str = "") -> str:
    """Read the models, write rows and table after each; returns the table as text."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {(row["package"], row["model"]): row for row in map(json.loads, lines)}
    for entry in chosen(only):
        key, missing = (entry.package, entry.name), entry.missing()
        if missing or (not only and key in rows):
            print(f"{entry.name}: {missing or 'is there'}", flush=True)
            continue
        rows[key] = read(entry)
        print(f"{entry.name}: {rows[key]['wrong'] or 'right'}, {rows[key]['seconds']} s", flush=True)
        ordered = [rows[k] for e in ENTRIES if (k := (e.package, e.name)) in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, "".join(json.dumps(row) + "\n" for row in ordered))
        tables.finish(ordered, path.with_suffix(".md"))
    return tables.text(list(rows.values()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of models or packages, joined by commas; all by default")
    parser.add_argument("--out", type=Path, default=ROWS, help="the rows; the table stands beside them")
    jax.config.update("jax_disable_most_optimizations", True)  # everything is compiled for one run
    try:
        given = parser.parse_args(argv)
        print(f"\n{run(given.out, given.only)}\n\nwritten to {given.out}")
    except (ValueError, OSError) as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
