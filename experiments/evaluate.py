"""Evaluate a saved compressed model on the test split of the data it was trained on.

Example:
  python -m experiments.evaluate --model=runs/digits/models/lenet_300_100-seed0-int8.jc

The file says which data, model and split it belongs to; ``--data_dir`` says where files of that data are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jcompress as jc
from experiments import data as datasets
from experiments import flags, models
from experiments.lab import Score, make_evaluate
from experiments.runner import refuse
from jcompress.io import inspect, load


def evaluate(path: str | Path, data_dir: str | None = None) -> tuple[dict[str, Any], Score]:
    """What the file says about itself, and the score on the test split.

    Raises:
      ValueError: if the file is damaged or no experiment's, or the data cannot be loaded.
    """
    about = inspect(path).get("metadata") or {}
    missing = {"data", "model", "seed"} - set(about)
    if missing:
        lacking = ", ".join(sorted(missing))
        raise ValueError(f"{path}: says nothing of its {lacking}; expected a file of experiments.compress")
    data = datasets.of(about["data"], data_dir, about.get("data_options", {}), about["seed"])
    module = models.build(about["model"], data.classes, about.get("model_options"))
    return about, make_evaluate(models.apply(module))(jc.materialize(load(path)), data.test)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="file written by experiments.compress")
    parser.add_argument("--data_dir", help="folder with the files of the data, where it is not embedded")
    args = parser.parse_args(argv)
    try:
        about, score = evaluate(args.model, args.data_dir)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    text = f", {score.bits:.6f} bits per byte" if about["data"] == "text" else ""
    what = f"{about['model']} seed {about['seed']} {about.get('plan', '')} on {about['data']}"
    print(f"{what}: test accuracy {100 * score.accuracy:.2f}% ({score.correct} of {score.total} correct){text}")
    print(f"{Path(args.model).stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
