"""Evaluate a saved compressed model on the test split of the data it was trained on.

Example:
  python -m experiments.evaluate --model=runs/digits/models/lenet_300_100-seed0-int8.jc

The file says which data, model and split it belongs to; ``--data_dir`` says where files of that data are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

import jcompress as jc
from experiments import data as datasets
from experiments import models, train
from jcompress.io import inspect, load

_MODEL = flags.DEFINE_string("model", None, "File written by experiments.compress.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the files of the data, where it is not embedded.")


def evaluate(path: str | Path, data_dir: str | None = None) -> tuple[dict[str, Any], train.Score]:
    """What the file says about itself, and the score on the test split.

    Raises:
      ValueError: if the file is damaged or no experiment's, or the data cannot be loaded.
    """
    about = inspect(path).get("metadata") or {}
    missing = {"data", "model", "seed"} - set(about)
    if missing:
        lacking = ", ".join(sorted(missing))
        raise ValueError(f"{path}: says nothing of its {lacking}; expected a file of experiments.compress")
    data = datasets.load(about["data"], data_dir, about["seed"], **about.get("data_options", {}))
    module = models.build(about["model"], data.classes, about.get("model_options"))
    return about, train.make_evaluate(models.apply(module))(jc.materialize(load(path)), data.test)


def main(argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.WARNING)
    try:
        about, score = evaluate(_MODEL.value, _DATA_DIR.value)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    text = f", {score.bits:.6f} bits per byte" if about["data"] == "text" else ""
    what = f"{about['model']} seed {about['seed']} {about.get('plan', '')} on {about['data']}"
    print(f"{what}: test accuracy {100 * score.accuracy:.2f}% ({score.correct} of {score.total} correct){text}")
    print(f"{Path(_MODEL.value).stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    app.run(main)
