"""Models to compress: small ones trained here (``small``), and a pretrained sentence encoder (``minilm``)."""

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
