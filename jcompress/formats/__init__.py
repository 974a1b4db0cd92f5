"""Formats: the nodes that stand for arrays. A format knows its bytes and its algebra, never how it was chosen."""

from jcompress.formats.cast import Cast
from jcompress.formats.codebook import Codebook
from jcompress.formats.lowrank import LowRank
from jcompress.formats.masked import Masked
from jcompress.formats.quantized import Quantized
from jcompress.formats.spectral import Spectral
from jcompress.formats.sum import Sum

__all__ = ["Cast", "Codebook", "LowRank", "Masked", "Quantized", "Spectral", "Sum"]
