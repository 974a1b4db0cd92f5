"""MNIST's 60,000 training images by LeNet-300-100 in every family.

Command: python -m experiments.families --config.data=mnist --data_dir=<folder with the idx files>
"""

from __future__ import annotations

from experiments.families.lab import Config
from experiments.families.ways import MATRICES


def get_config() -> Config:
    """A tenth of the training images is for validation; the last layer, 1,000 numbers of 266,200, stays dense."""
    return Config(
        name="mnist",
        ways=MATRICES,
        data="mnist",
        data_options={"val": 0.1},
        kept="head/kernel",
        steps=5000,
        finetuning=600,
        batch_size=100,
    )
