"""Pairs of sentences by a pretrained encoder, in families of matrices; what is told is 100 (1 - rank correlation).

Command: python -m experiments.families --config.data=sts --data_dir=<folder with sentences.txt, the pairs, minilm>
"""

from __future__ import annotations

from experiments.families.lab import Config

WAYS = (
    "dense", "SVD", "whitened SVD", "tensor train", "Kronecker", "chosen ranks", "SVD, 8 bits", "random factors",
    "ranks and bits chosen", "magnitude, 8 bits", "units", "shared values", "shared blocks of 4",
    "shared blocks of 4, by outputs", "shared blocks, twice", "hashed", "circulant", "trellis", "GPTQ",
)  # fmt: skip


def get_config() -> Config:
    """All kernels of the six layers; of three rates that were tried this one leads on sentences held out."""
    return Config(
        name="sts", ways=WAYS, data="sts", data_options={}, model="minilm", rules="layer_.*/kernel", steps=0,
        finetuning=100, finetuning_rate=0.003, batch_size=32,
    )  # fmt: skip
