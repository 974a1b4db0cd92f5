"""MNIST from its idx files: the full data set where the training files are there, else the 10,000 of its test split.

Command: python -m experiments.compress --config.data=mnist --data_dir=<folder with the idx files>

@@
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.configs import digits


def get_config() -> ConfigDict:
    """The plans of the digits, on LeNet-300-100 and LeNet-5 as in Caffe."""
    config = digits.get_config()
    config.name = "mnist"
    config.data = "mnist"
    config.data_options = ConfigDict()
    config.models = ("lenet_300_100", "lenet5")
    config.epochs = 10.0
    config.finetune_epochs = 6.0
    config.batch_size = 128
    return config
