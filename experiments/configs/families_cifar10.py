"""CIFAR-10 by a ResNet-20 that was trained elsewhere, in every family; all convolutions but the first.

Command: python -m experiments.families --config.data=cifar10 --data_dir=<folder with CIFAR-10 and resnet20_cifar10.npz>
"""

from __future__ import annotations

from experiments.families.lab import Config


def get_config() -> Config:
    """On the first 2,000 test images; --config.model=resnet56 is the deeper network."""
    return Config(
        name="cifar10", data="cifar10", data_options={"val": 0.1}, model="resnet20", rules=r".*conv\d/weight",
        kept="conv1/weight", steps=0, finetuning=60, batch_size=64, test=2000,
    )  # fmt: skip
