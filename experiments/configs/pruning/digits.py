"""scikit-learn's digits by LeNet-300-100 and a small CNN.

Command: python -m experiments.prune
"""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.pruning.ways import WAYS


def get_config() -> ConfigDict:
    """Fork this file, or change a value with ``--config.<name>=<value>``."""
    config = ConfigDict()
    config.name = "digits"
    config.data = "digits"
    config.data_options = ConfigDict({"val": 0.2, "test": 0.2})
    config.models = ("lenet_300_100", "cnn")
    config.model_options = ConfigDict()
    config.ways = tuple(WAYS)  # names in experiments/pruning/ways.py
    config.sparsities = (0.8, 0.9, 0.95, 0.98)
    config.seeds = 3

    config.steps = ConfigDict({"lenet_300_100": 2400, "cnn": 1600})  # the budget, the dense half included
    config.batch_size = ConfigDict({"lenet_300_100": 64, "cnn": 64})
    config.learning_rate = 2e-3  # of Adam at its peak, for all training
    config.gate_rate = 10.0  # gates and scores learn faster than weights, by this
    config.pressure = 10.0  # on the density of hard concrete gates
    config.examples = 512  # that SNIP, GraSP, Wanda and SparseGPT look at
    return config
