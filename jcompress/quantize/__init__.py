"""Grids, ranges and rounding."""

from jcompress.quantize import distortions, ranges, training
from jcompress.quantize.adaround import AdaRound
from jcompress.quantize.alignment import align
from jcompress.quantize.awq import AWQ
from jcompress.quantize.dependent import Dependent
from jcompress.quantize.floating import Float
from jcompress.quantize.floats import Float4, Float8
from jcompress.quantize.gpfq import GPFQ
from jcompress.quantize.gptq import GPTQ
from jcompress.quantize.hqq import HQQ
from jcompress.quantize.inq import INQ
from jcompress.quantize.integer import FixedPoint, Int
from jcompress.quantize.integer_products import activations
from jcompress.quantize.lab import LAB
from jcompress.quantize.lqer import LQER
from jcompress.quantize.microscaling import NVFP4, Microscaling
from jcompress.quantize.rate_distortion import RateDistortion
from jcompress.quantize.requantization import fixed_point, requantize
from jcompress.quantize.rotation import Rotation
from jcompress.quantize.squeezed import S2FP8
from jcompress.quantize.stochastic import Stochastic
from jcompress.quantize.tables import NF4, AdditivePowersOfTwo, PowersOfTwo, Table
from jcompress.quantize.ternary import ABCNet, Ternary
from jcompress.quantize.training.optimizer import moments, round_gradients
from jcompress.quantize.vector_codes import E8P, Trellis
from jcompress.quantize.water_filling import WaterFilling

__all__ = [
    "AWQ",
    "E8P",
    "GPFQ",
    "GPTQ",
    "HQQ",
    "INQ",
    "LAB",
    "LQER",
    "NF4",
    "NVFP4",
    "S2FP8",
    "ABCNet",
    "AdaRound",
    "AdditivePowersOfTwo",
    "Dependent",
    "FixedPoint",
    "Float",
    "Float4",
    "Float8",
    "Int",
    "Microscaling",
    "PowersOfTwo",
    "RateDistortion",
    "Rotation",
    "Stochastic",
    "Table",
    "Ternary",
    "Trellis",
    "WaterFilling",
    "activations",
    "align",
    "distortions",
    "fixed_point",
    "moments",
    "ranges",
    "requantize",
    "round_gradients",
    "training",
]
