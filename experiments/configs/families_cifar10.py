"""CIFAR-10 by a ResNet-20 that was trained elsewhere, in every family; all convolutions but the first.

Command: python -m experiments.families --config.data=cifar10 --data_dir=<folder with CIFAR-10 and resnet20_cifar10.npz>
"""

from __future__ import annotations

from experiments.families.lab import Config

WAYS = (
    "dense", "whitened SVD", "Tucker", "CP", "whitened CP", "chosen ranks", "chosen CP", "random factors",
    "ranks and bits chosen", "magnitude, 8 bits", "units", "shared values", "shared blocks of 4",
    "shared blocks, twice", "shared blocks, in sum", "hashed", "circulant", "rounding", "trellis", "GPTQ",
)  # fmt: skip


def get_config() -> Config:
    """On the first 2,000 test images; the rate lies between two that were tried on the last training images."""
    return Config(
        name="cifar10", ways=WAYS, data="cifar10", data_options={"val": 0.02}, model="resnet20",
        rules=r".*conv\d/weight", kept="conv1/weight", steps=0, finetuning=40, finetuning_rate=0.001,
        batch_size=64, test=2000,
    )  # fmt: skip
