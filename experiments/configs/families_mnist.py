"""MNIST's 60,000 training images by LeNet-300-100 in every family.

Command: python -m experiments.families --config.data=mnist --data_dir=<folder with the idx files>
"""

from __future__ import annotations

from experiments.families.lab import Config
from experiments.families.ways import MATRICES


def get_config() -> Config:
    """The last 5,000 training images are for validation."""
    return Config(
        name="mnist", ways=MATRICES, data="mnist", data_options={"val": 0.1}, steps=5000, finetuning=600, batch_size=100
    )
