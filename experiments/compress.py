"""The main job: train small models on real data, compress them by each plan of a config, fine-tune, measure.

Examples:
  python -m experiments.compress
  python -m experiments.compress --config.data=mnist --data_dir=<folder with MNIST's idx files>
  python -m experiments.compress --config.data=text --data_dir=<folder with tinyshakespeare.txt>
  python -m experiments.compress --config=my_config.py --config.only=int8,svd --config.seeds=5

It writes to ``--workdir``: ``table.txt`` and ``table.md``, ``results.jsonl``, ``pareto.png``, ``record.json``, and
the compressed models. Interrupted, the same command continues.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import runner


def config_of_data(argv: Sequence[str]) -> str:
    """The config file of the data that ``--config.data=<data>`` names, else that of the digits."""
    folder = Path(__file__).parent / "configs"
    named = [a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config.data=")]
    path = folder / f"{named[-1]}.py" if named and named[-1].isidentifier() else folder / "digits.py"
    return str(path if path.exists() else folder / "digits.py")


_CONFIG = config_flags.DEFINE_config_file("config", config_of_data(sys.argv), "What to train and compress.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the files of the data, where it is not embedded.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; runs/<name of the config> by default.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete what an earlier run wrote to the workdir.")


def main(argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        print(f"error: {argv[1]!r} is no flag; see --help", file=sys.stderr)
        return 2
    return runner.run(_CONFIG.value, _DATA_DIR.value, _WORKDIR.value, _OVERWRITE.value)


if __name__ == "__main__":
    app.run(main)
