"""``jcompress export``: files that other programs read."""

from __future__ import annotations

import argparse
import os
import shutil
from typing import Any

import jcompress as jc
from jcompress import io
from jcompress.core import Layout
from jcompress.io import files, reading
from jcompress.io.tensors import parsed
from jcompress.measure.units import in_bytes
from jcompress_command import SAME, say


def export(given: argparse.Namespace) -> int:
    """Write the file or folder, and a line on its size."""
    write = {"safetensors": _safetensors, "gguf": _gguf, "compressed-tensors": _compressed_tensors}[given.to]
    if given.kind is not None and given.to != "gguf":
        raise ValueError(f"--kind {given.kind}: found --to {given.to}, expected gguf; leave it out")
    say(f"{given.output}: {in_bytes(write(given))}")
    return SAME


def _tree(given: argparse.Namespace) -> Any:
    if reading.kind_of(given.source) == "jcompress":
        return jc.load(given.source)
    return dict(io.read_tensors(given.source))


def _layout(given: argparse.Namespace) -> Layout | None:
    return Layout() if given.layout == "in-out" else None


def _safetensors(given: argparse.Namespace) -> int:
    source = io.read_tensors(given.source)
    like = {} if given.like is None else io.read_tensors(given.like).metadata
    texts = {name: x for name, x in {**source.metadata, **like}.items() if isinstance(x, str)}
    return io.write_safetensors(given.output, source, metadata=texts)


def _gguf(given: argparse.Namespace) -> int:
    original = given.like or (given.source if reading.kind_of(given.source) == "gguf" else None)
    metadata = {} if original is None else io.read_gguf(original).metadata
    kinds = {} if given.kind is None else {".*": given.kind}
    return io.export_gguf(given.output, _tree(given), metadata=metadata, layout=_layout(given), kinds=kinds)


def _compressed_tensors(given: argparse.Namespace) -> int:
    """The folder, with what else is in the original's: its configuration, its tokenizer."""
    others = [] if given.like is None or not os.path.isdir(given.like) else sorted(os.listdir(given.like))
    config = {}
    if "config.json" in others:
        with files.reading(os.path.join(given.like, "config.json")) as file:
            config = parsed(file.name, file.read(), "the configuration")
    size = io.export_compressed_tensors(given.output, _tree(given), layout=_layout(given), config=config)
    for name in others:
        path = os.path.join(given.like, name)
        if os.path.isfile(path) and name != "config.json" and ".safetensors" not in name:
            shutil.copy(path, given.output)
    return size
