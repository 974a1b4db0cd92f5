"""Models to compress.

Small ones trained here (``small``), a pretrained sentence encoder (``minilm``), a decoder of language (``llama``).
"""

from experiments.models.small import (
    CNN,
    MODELS,
    Block,
    LeNet5,
    LeNet300100,
    PyTree,
    Transformer,
    apply,
    build,
    check,
    init,
)

__all__ = [
    "CNN",
    "MODELS",
    "Block",
    "LeNet5",
    "LeNet300100",
    "PyTree",
    "Transformer",
    "apply",
    "build",
    "check",
    "init",
]
