"""Grids, ranges and rounding."""

from jcompress.quantize.floating import Float
from jcompress.quantize.integer import Int

__all__ = ["Float", "Int"]
