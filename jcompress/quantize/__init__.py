"""Grids, ranges and rounding."""

from jcompress.quantize import ranges, training
from jcompress.quantize.activations import activations
from jcompress.quantize.correction import Pair, correct_biases, equalize
from jcompress.quantize.floating import Float
from jcompress.quantize.floats import Float4, Float8
from jcompress.quantize.integer import FixedPoint, Int
from jcompress.quantize.microscaling import NVFP4, Microscaling
from jcompress.quantize.stochastic import Stochastic
from jcompress.quantize.tables import NF4, AdditivePowersOfTwo, PowersOfTwo, Table
from jcompress.quantize.ternary import ABCNet, Ternary
from jcompress.quantize.training.optimizer import gradients, moments

__all__ = [
    "NF4",
    "NVFP4",
    "ABCNet",
    "AdditivePowersOfTwo",
    "FixedPoint",
    "Float",
    "Float4",
    "Float8",
    "Int",
    "Microscaling",
    "Pair",
    "PowersOfTwo",
    "Stochastic",
    "Table",
    "Ternary",
    "activations",
    "correct_biases",
    "equalize",
    "gradients",
    "moments",
    "ranges",
    "training",
]
