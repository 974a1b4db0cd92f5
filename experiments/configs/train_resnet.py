"""ResNet-20, trained in 4 bits: ``--config=experiments/configs/train_resnet.py --data_dir=<folder of CIFAR-10>``.

With ``:tiny`` a ResNet-8 learns synthetic images, for which no files are needed.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

import jcompress as jc


def rules(config: ConfigDict) -> list[tuple[str, Any]]:
    """Convolutions of the stages in few bits, a scale for each output; stem, norms and head stay dense."""
    return [("layer.*/conv./weight", jc.quantize.Int(bits=config.compress.bits))]


def get_config(size: str = "resnet20") -> ConfigDict:
    """The config of ``resnet20`` or ``tiny``."""
    if size not in ("resnet20", "tiny"):
        raise ValueError(f"--config=...:{size}: is unknown; use resnet20 or tiny")
    config, tiny = ConfigDict(), size == "tiny"
    config.name, config.seed, config.steps = f"resnet_{size}", 0, 100 if tiny else 20_000
    config.batch_size, config.accumulate = (32, 1) if tiny else (128, 1)
    depth, width = (8, 8) if tiny else (20, 16)
    config.model = ConfigDict({"name": "resnet", "depth": depth, "width": width, "dtype": "bfloat16"})
    data = ("synthetic_images", {"examples": 512}) if tiny else ("cifar10", {})
    config.data = ConfigDict({"name": data[0], "options": data[1], "augment": True})
    config.optimizer = ConfigDict({"learning_rate": 3e-3, "warmup": 10 if tiny else 500, "weight_decay": 0.05})
    config.compress = ConfigDict({"how": "simulate", "every": 1, "bits": 4})
    config.compress.rules = rules
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    config.sharding = [("layer.*/conv./weight", ("fsdp", None, None, None))]
    config.checkpoint = ConfigDict({"every": 50 if tiny else 1_000, "keep": 2})
    config.eval_every, config.eval_batches, config.log_every = (0, 0, 10) if tiny else (1_000, 0, 100)
    config.tensorboard = False
    return config
