"""Bytes of Shakespeare by a small causal transformer in every family, in bits per byte.

Command: python -m experiments.families --config.data=text --data_dir=<folder with tinyshakespeare.txt>
"""

from __future__ import annotations

from experiments.families.lab import Config

WAYS = (
    "dense", "whitened SVD", "chosen ranks", "SVD, 8 bits", "random factors", "magnitude, 8 bits", "units",
    "shared values", "shared blocks of 4", "shared blocks, twice", "shared values, by outputs",
    "shared blocks of 4, by outputs", "hashed", "tied layers", "circulant", "trellis", "GPTQ",
)  # fmt: skip


def get_config() -> Config:
    """The transformer of the pruning experiment."""
    return Config(
        name="text", ways=WAYS, data="text", data_options={"length": 32, "val": 0.02}, model="transformer",
        model_options={"width": 64, "layers": 2, "heads": 2, "longest": 32}, steps=2000, finetuning=150, batch_size=32,
        learning_rate=4e-3,
    )  # fmt: skip
