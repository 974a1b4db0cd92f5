"""MNIST from its idx files: the full data set where the training files are there, else the 10,000 of its test split.

Command: python -m experiments.compress --config.data=mnist --data_dir=<folder with the idx files>

Expect on the 10,000 images (8,000 train, 2,000 test), with --config.seeds=1: dense baselines LeNet-300-100 97.2
percent (1.07 MB) and LeNet-5 98.8 percent (1.72 MB); 4 bits 97.5 and 98.8 percent (7.8x); 90 percent pruned gradually
96.9 and 98.7 percent; deep_compression 96.5 percent at 32 kB (33x) and 98.2 percent at 51 kB (34x); a random mask
93.6 and 95.1 percent. Time for one seed: about 8 CPU minutes; 14 min on two busy cores.
Those of gradual pruning were measured with a ramp over two thirds of the steps, not half.
"""

from __future__ import annotations

import dataclasses

from experiments import compress


def get_config() -> compress.Config:
    """The ways of the digits, on LeNet-300-100 and LeNet-5 as in Caffe."""
    return dataclasses.replace(
        compress.Config(),
        name="mnist",
        data="mnist",
        data_options={},
        models=("lenet_300_100", "lenet5"),
        epochs=10.0,
        finetune_epochs=6.0,
        batch_size=128,
    )
