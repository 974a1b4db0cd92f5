"""Draw the tables and pictures of ``results/`` again, from the rows that are stored there.

    python -m experiments.results

A folder there holds what a run's ``--workdir`` held, without the networks: rows, table and picture, under the name of
the config. To publish a run, copy its ``results.jsonl`` there as ``<name>.jsonl`` and run this. ``index.md`` and
``index.html`` there have all records on one page: see :mod:`experiments.page`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import (
    alternation,
    flags,
    lighter,
    llm,
    minilm,
    orders,
    page,
    pipelines,
    prune,
    search,
    smaller,
    tables,
)
from experiments.codec import __main__ as codec
from experiments.distillation import minilm as halves
from experiments.distillation import schools, studies
from experiments.families import __main__ as families
from experiments.quantization import training
from experiments.runner import refuse
from experiments.workdir import Row, Rows
from experiments.zoo import tables as zoo

RESULTS = Path(__file__).parent.parent / "results"
TITLES = {
    "digits": "digits: 1078 train, 360 validation, 359 test",
    "mnist": "MNIST-10k: 7200 train, 800 validation, 2000 test",
    "text": "text (tinyshakespeare.txt)",
}


def rows(path: Path, keys: Sequence[str]) -> list[Row]:
    """The rows of a file, each thing measured once."""
    return list(Rows(path, keys))


def draw(folder: Path) -> list[Path]:
    """Write all tables and pictures; return the pictures."""
    made = []
    for path in sorted((folder / "compress").glob("*.jsonl")):
        found, (table, picture) = rows(path, ("model", "seed", "plan")), beside(path)
        tables.finish(found, table, picture, TITLES.get(path.stem, path.stem))
        made.append(picture)
    for path in sorted((folder / "pruning").glob("*.jsonl")):
        found, (table, picture) = rows(path, prune.Pruning.keys), beside(path)
        prune.finish(found, "text" if path.stem == "text" else "image", table, picture, TITLES[path.stem])
        made.append(picture)
    for path in sorted((folder / "families").glob("*.jsonl")):
        data, _, model = path.stem.partition("_")
        found, config = rows(path, families.Comparison.keys), families.config_of(data)
        kind, (table, picture) = {"text": "text", "sts": "pairs"}.get(data, "image"), beside(path)
        families.finish(found, kind, config.finetuning, table, picture, f"{model or config.model}, {data}")
        made.append(picture)
    for path in sorted((folder / "llm").glob("*.jsonl")):
        table, picture = beside(path)
        llm.finish(rows(path, llm.Language.keys), table, picture)
        made.append(picture)
    made += _distillation(folder / "distillation")
    models = folder / "zoo" / "models.jsonl"
    zoo.finish(rows(models, ("package", "model")), models.with_suffix(".md"))
    quantization = folder / "quantization"
    table, picture = beside(quantization / "minilm.jsonl")
    minilm.finish(rows(quantization / "minilm.jsonl", minilm.Encoding.keys), table, picture)
    made.append(picture)
    table, picture = beside(quantization / "training.json")
    training.finish(json.loads((quantization / "training.json").read_text())["rows"], table, picture)
    for path in sorted((folder / "pipelines").glob("*.jsonl")):
        pipelines.publish(rows(path, pipelines.Staged.keys), path.stem, beside(path)[0])
    for path in sorted((folder / "codec").glob("*.jsonl")):
        own = rows(path, codec.Comparison.keys)
        cells = (codec.table if any(row["coder"] == "NNCodec" for row in own) else codec.files)(own)
        beside(path)[0].write_text(tables.markdown(cells) + "\n")
    for path in sorted((folder / "alternation").glob("*.jsonl")):
        alternation.publish(rows(path, alternation.Alternation.keys), beside(path)[0])
    for path in sorted((folder / "lighter").glob("*.jsonl")):
        lighter.publish(rows(path, lighter.Lighter.keys), beside(path)[0])
    for path in sorted((folder / "smaller").glob("*.jsonl")):
        smaller.publish(rows(path, smaller.Smaller.keys), beside(path)[0])
    for path in sorted((folder / "search").glob("*.jsonl")):
        search.publish(rows(path, search.Searches.keys), beside(path)[0])
    for path in sorted((folder / "orders").glob("*.jsonl")):
        orders.publish(rows(path, orders.Orders.keys), beside(path)[0])
    return [*made, picture]


def _distillation(folder: Path) -> list[Path]:
    made = []
    for path in sorted(folder.glob("losses_*.jsonl")):
        table, picture = beside(path)
        schools.finish(
            rows(path, schools.Schools.keys), "text" if path.stem == "losses_text" else "image", table, picture
        )
        made.append(picture)
    for path in sorted(folder.glob("studies_*.jsonl")):
        studies.finish(rows(path, studies.Studies.keys), beside(path)[0])
    for path in sorted(folder.glob("minilm.jsonl")):
        table, picture = beside(path)
        halves.finish(rows(path, halves.Halving.keys), table, picture)
        made.append(picture)
    return made


def beside(path: Path) -> tuple[Path, Path]:
    """Where the table and the picture of these rows stand."""
    return path.with_suffix(".md"), path.with_suffix(".png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="the folder with the rows")
    try:
        folder = parser.parse_args(argv).folder
        print("\n".join(map(str, draw(folder))))
        page.write(folder)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
