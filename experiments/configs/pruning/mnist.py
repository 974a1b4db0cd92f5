"""MNIST's own 10,000 test images, 8,000 to train and 2,000 to test, by LeNet-300-100 and a small CNN.

Command: python -m experiments.prune --config.data=mnist --data_dir=<folder with the idx files>
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs.pruning import digits
from experiments.pruning.ways import SHORT


def get_config() -> ConfigDict:
    """The shorter list of ways."""
    config = digits.get_config()
    config.name = "mnist"
    config.data = "mnist"
    config.data_options = ConfigDict({"val": 0.1})
    config.ways = SHORT
    config.model_options = ConfigDict({"cnn": {"width": 8}})
    config.steps = ConfigDict({"lenet_300_100": 800, "cnn": 400})
    config.batch_size = ConfigDict({"lenet_300_100": 100, "cnn": 64})
    return config
