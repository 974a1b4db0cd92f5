"""Storage: one file for a compressed model, checkpoints for training, and nodes in exported functions."""

from jcompress.io.checkpoint import Checkpoints
from jcompress.io.compressed_tensors import export_compressed_tensors
from jcompress.io.export import register_export
from jcompress.io.gguf import read_gguf, write_gguf
from jcompress.io.gguf_nodes import export_gguf
from jcompress.io.manifest import StorageError
from jcompress.io.programs import export_onnx, export_stablehlo, load_stablehlo
from jcompress.io.reading import read_tensors
from jcompress.io.safetensors import read_safetensors, write_safetensors
from jcompress.io.sizes import nbits as nbits
from jcompress.io.storage import inspect
from jcompress.io.storage import load as load
from jcompress.io.storage import save as save
from jcompress.io.tensors import Tensors

__all__ = [
    "Checkpoints",
    "StorageError",
    "Tensors",
    "export_compressed_tensors",
    "export_gguf",
    "export_onnx",
    "export_stablehlo",
    "inspect",
    "load_stablehlo",
    "read_gguf",
    "read_safetensors",
    "read_tensors",
    "register_export",
    "write_gguf",
    "write_safetensors",
]
