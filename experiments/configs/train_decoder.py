"""A decoder transformer, compressed while it is trained: ``--config=experiments/configs/train_decoder.py:<size>``.

Sizes: ``tiny`` (synthetic bytes, no files needed), ``small`` (bytes of tinyshakespeare), ``7b``. Every field is a flag:
``--config.mesh.tensor=4 --config.compress.sparsity=0.9 --config.compress.how=simulate``. Another plan is another
function ``rules`` in a copy of this file.
"""

from __future__ import annotations

from typing import Any

import optax
from ml_collections import ConfigDict

import jcompress as jc

KERNELS = "layers/.*kernel"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 128},
    "small": {"width": 384, "layers": 6, "heads": 6, "kv_heads": 2, "head_dim": 64, "hidden": 1024},
    "7b": {"width": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 14336, "tied": False},
}


def rules(config: ConfigDict) -> list[tuple[str, Any]]:
    """Kernels of the layers are pruned on a cubic ramp over the first half, or at once where nodes are trained."""
    sparsity: Any = config.compress.sparsity
    if config.compress.how != "nodes":
        sparsity = optax.polynomial_schedule(0.0, sparsity, power=3, transition_steps=max(config.steps // 2, 1))
    return [(KERNELS, jc.prune.Magnitude(sparsity=sparsity))]


def sharding(tied: bool) -> list[tuple[str, tuple]]:
    """What the last axes of parameters are spread over: inputs or outputs of a product by ``tensor``, the other by
    ``fsdp``."""
    head = [] if tied else [("head/kernel", ("fsdp", "tensor"))]
    return [
        ("embed/embedding", ("tensor", "fsdp")),
        ("layers/.*(q|k|v|gate|up)/kernel", ("fsdp", "tensor")),
        ("layers/.*(out|down)/kernel", ("tensor", "fsdp")),
        *head,
    ]


def get_config(size: str = "tiny") -> ConfigDict:
    """The config of a size."""
    if size not in SIZES:
        raise ValueError(f"--config=...:{size}: is unknown; use one of {', '.join(SIZES)}")
    config, tiny = ConfigDict(), size == "tiny"
    config.name, config.seed, config.steps = f"decoder_{size}", 0, 300 if tiny else 5_000
    config.batch_size, config.accumulate = (32, 1) if tiny else (64, 1)
    config.model = ConfigDict(
        {"name": "decoder", **SIZES[size], "stacked": True, "remat": not tiny, "dtype": "bfloat16"}
    )
    data = ("synthetic_text", {"length": 32, "examples": 2048}) if tiny else ("text", {"length": 256})
    config.data = ConfigDict({"name": data[0], "options": data[1]})
    config.optimizer = ConfigDict({"learning_rate": 5e-3 if tiny else 1e-3, "warmup": 50, "weight_decay": 0.1})
    config.compress = ConfigDict({"how": "project", "every": 20, "sparsity": 0.8})
    config.compress.rules = rules
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    config.sharding = sharding(SIZES[size].get("tied", True))
    config.checkpoint = ConfigDict({"every": 100 if tiny else 500, "keep": 2})
    config.eval_every, config.eval_batches, config.log_every = (100, 4, 20) if tiny else (500, 16, 50)
    config.tensorboard = False
    return config
