"""MNIST's own 10,000 test images, 8,000 to train and 2,000 to test, by LeNet-300-100 and a small CNN.

Command: python -m experiments.prune --config.data=mnist --data_dir=<folder with the idx files>
"""

from __future__ import annotations

from experiments.pruning.lab import Config
from experiments.pruning.ways import SHORT


def get_config() -> Config:
    """The shorter list of ways."""
    return Config(
        name="mnist",
        data="mnist",
        data_options={"val": 0.1},
        ways=SHORT,
        model_options={"cnn": {"width": 8}},
        steps={"lenet_300_100": 800, "cnn": 400},
        batch_size={"lenet_300_100": 100, "cnn": 64},
    )
