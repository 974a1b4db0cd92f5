"""Formats: the nodes that stand for arrays. A format knows its bytes and its algebra, never how it was chosen."""

from jcompress.core import Reference
from jcompress.formats.annealed import Annealed
from jcompress.formats.arranged import Arranged
from jcompress.formats.binarized import Binarized
from jcompress.formats.bottleneck import Bottleneck
from jcompress.formats.cast import Cast
from jcompress.formats.codebook import Codebook
from jcompress.formats.coded import Coded
from jcompress.formats.complexes import Cartesian
from jcompress.formats.dependent_codes import DependentCodes
from jcompress.formats.fake_quantized import FakeQuantized
from jcompress.formats.fast_product import FastProduct
from jcompress.formats.frozen import Frozen
from jcompress.formats.gated import Gated
from jcompress.formats.gathered import Gathered
from jcompress.formats.gaussian import Gaussian
from jcompress.formats.horseshoe import Horseshoe
from jcompress.formats.interpolated import Interpolated
from jcompress.formats.jeffreys import Jeffreys
from jcompress.formats.learned_integers import Latent
from jcompress.formats.lowrank import LowRank
from jcompress.formats.masked import Masked
from jcompress.formats.network import TensorNetwork
from jcompress.formats.packed import Bits, Packed
from jcompress.formats.quantized import Quantized
from jcompress.formats.rescaled import Rescaled
from jcompress.formats.rotated import Rotated
from jcompress.formats.scored import Scored
from jcompress.formats.shift_add import ShiftAdd
from jcompress.formats.soft_codebook import SoftCodebook
from jcompress.formats.soft_threshold import SoftThreshold
from jcompress.formats.spectral_form import Spectral
from jcompress.formats.squeezed import Squeezed
from jcompress.formats.sum import Sum
from jcompress.formats.summed_templates import Mixed
from jcompress.formats.ternarized import Ternarized

__all__ = [
    "Annealed",
    "Arranged",
    "Binarized",
    "Bits",
    "Bottleneck",
    "Cartesian",
    "Cast",
    "Codebook",
    "Coded",
    "DependentCodes",
    "FakeQuantized",
    "FastProduct",
    "Frozen",
    "Gated",
    "Gathered",
    "Gaussian",
    "Horseshoe",
    "Interpolated",
    "Jeffreys",
    "Latent",
    "LowRank",
    "Masked",
    "Mixed",
    "Packed",
    "Quantized",
    "Reference",
    "Rescaled",
    "Rotated",
    "Scored",
    "ShiftAdd",
    "SoftCodebook",
    "SoftThreshold",
    "Spectral",
    "Squeezed",
    "Sum",
    "TensorNetwork",
    "Ternarized",
]
