"""Storage: one file for a compressed model, and checkpoints for training."""

from jcompress.io.manifest import StorageError
from jcompress.io.storage import inspect, load, save

__all__ = ["StorageError", "inspect", "load", "save"]
