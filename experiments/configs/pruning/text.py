"""Bytes of Shakespeare by a small causal transformer, in bits per byte.

Command: python -m experiments.prune --config.data=text --data_dir=<folder with tinyshakespeare.txt>
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs.pruning import digits
from experiments.pruning.ways import SHORT


def get_config() -> ConfigDict:
    """The shorter list of ways."""
    config = digits.get_config()
    config.name = "text"
    config.data = "text"
    config.data_options = ConfigDict({"length": 32, "val": 0.02})
    config.models = ("transformer",)
    config.ways = SHORT
    config.model_options = ConfigDict({"transformer": {"width": 64, "layers": 2, "heads": 2, "longest": 32}})
    config.steps = ConfigDict({"transformer": 600})
    config.batch_size = ConfigDict({"transformer": 32})
    config.learning_rate = 4e-3
    return config
