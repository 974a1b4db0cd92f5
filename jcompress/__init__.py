"""Compression of neural networks as pure transformations on parameter pytrees."""

import importlib
import types
import typing

from jcompress import budget, distill, factorize, formats, io, measure, prune, quantize, rewrite, share, trace
from jcompress.apply import compress, simulate
from jcompress.budget import search
from jcompress.combine import cartesian, chain, residual, stacked
from jcompress.core import (
    CalibrationWarning,
    Compressed,
    Context,
    Layout,
    Method,
    finalize,
    materialize,
    merge,
    split,
    untie,
)
from jcompress.formats.packed import pack, unpack
from jcompress.io import load, nbits, save
from jcompress.lagrangian import LCState, lc
from jcompress.measure import report
from jcompress.numeric.surrogates import straight_through
from jcompress.projection import ProjectState, project
from jcompress.rules import Plan, paths, plan
from jcompress.sequential import compress_sequentially
from jcompress.share.tying import tie
from jcompress.stored_stats import StoredStats, load_stats, save_stats
from jcompress.streaming import compress_file
from jcompress.trace import accelerate, calibrate, shrink
from jcompress.transforms import nodes
from jcompress.version import __version__

if typing.TYPE_CHECKING:
    from jcompress import nn

__all__ = [
    "CalibrationWarning",
    "Compressed",
    "Context",
    "LCState",
    "Layout",
    "Method",
    "Plan",
    "ProjectState",
    "StoredStats",
    "__version__",
    "accelerate",
    "budget",
    "calibrate",
    "cartesian",
    "chain",
    "compress",
    "compress_file",
    "compress_sequentially",
    "distill",
    "factorize",
    "finalize",
    "formats",
    "io",
    "lc",
    "load",
    "load_stats",
    "materialize",
    "measure",
    "merge",
    "nbits",
    "nn",
    "nodes",
    "pack",
    "paths",
    "plan",
    "project",
    "prune",
    "quantize",
    "report",
    "residual",
    "rewrite",
    "save",
    "save_stats",
    "search",
    "share",
    "shrink",
    "simulate",
    "split",
    "stacked",
    "straight_through",
    "tie",
    "trace",
    "unpack",
    "untie",
]


def __getattr__(name: str) -> types.ModuleType:
    """``nn`` offers Flax modules: it, and Flax with it, is imported when it is first asked for."""
    if name == "nn":
        return importlib.import_module("jcompress.nn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
