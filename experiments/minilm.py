"""A pretrained sentence encoder, quantized in many ways: stored bytes against agreement with human judgement.

Examples:
  python -m experiments.minilm --model_dir=<folder with model.safetensors> --data_dir=<folder with sts2015_images.tsv>
  python -m experiments.minilm --model_dir=... --data_dir=... --config.only=int8,gptq4

It writes to ``--workdir``: ``results.jsonl``, ``layers.jsonl``, ``table.txt``, ``table.md``, ``pareto.png``,
``record.json`` and the compressed models. Interrupted, the same command continues: rows that are finished are not
made again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.quantization.quantizing import Run
from experiments.runs import Interrupted, Signals, command

_FILE = Path(__file__).parent / "configs" / "quantization" / "minilm.py"
_CONFIG = config_flags.DEFINE_config_file("config", str(_FILE), "How to compress.")
_MODEL_DIR = flags.DEFINE_string("model_dir", None, "Folder with the weights of all-MiniLM-L6-v2.", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the pairs of sentences.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; runs/<name of the config> by default.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete what an earlier run wrote to the workdir.")


def main(argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        print(f"error: {argv[1]!r} is no flag; see --help", file=sys.stderr)
        return 2
    with Signals() as signals:
        try:
            job = Run(_CONFIG.value, _MODEL_DIR.value, _DATA_DIR.value, _WORKDIR.value, _OVERWRITE.value)
            job.run(signals)
        except Interrupted as signal:
            again = command().replace(" --overwrite", "")
            print(f"interrupted by {signal}; to continue: {again}", file=sys.stderr)
            return 128 + signal.number
        except (ValueError, OSError, ImportError) as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            return 2
        print(job.finish())
    return 0


if __name__ == "__main__":
    app.run(main)
