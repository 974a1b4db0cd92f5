"""Bytes of Shakespeare by a small causal transformer, in bits per byte.

Command: python -m experiments.prune --config.data=text --data_dir=<folder with tinyshakespeare.txt>
"""

from __future__ import annotations

from experiments.pruning.lab import Config
from experiments.pruning.ways import SHORT


def get_config() -> Config:
    """The shorter list of ways."""
    return Config(
        name="text",
        data="text",
        data_options={"length": 32, "val": 0.02},
        models=("transformer",),
        ways=SHORT,
        model_options={"transformer": {"width": 64, "layers": 2, "heads": 2, "longest": 32}},
        steps={"transformer": 600},
        batch_size={"transformer": 32},
        learning_rate=4e-3,
    )
