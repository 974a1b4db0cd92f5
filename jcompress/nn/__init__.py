"""Compact filters and dynamic networks: functions of arrays, and Flax NNX modules that hold their parameters.

Features stand as in Flax, (batch, positions..., channels), and kernels as (window..., inputs, outputs). Flax is
imported when this room is first asked for.
"""

from jcompress.nn.blocks import Fire, InvertedResidual, SqueezeExcite, fire, inverted_residual, squeeze_excite
from jcompress.nn.cyclic import CyclicConv, cyclic_pool, cyclic_roll, cyclic_slice, cyclic_stack
from jcompress.nn.equivariant import GroupConv, LiftConv, group_convolution, lift_convolution, transform_plane
from jcompress.nn.fast_filters import FFTConv, WinogradConv, fft_convolution, winograd_convolution
from jcompress.nn.separated import (
    DepthwiseSeparable,
    GroupedConv,
    SplitRecurrentConv,
    channel_shuffle,
    depthwise_kernels,
    depthwise_separable,
    grouped_convolution,
    grouped_kernel,
    split_recurrent,
)
from jcompress.nn.shared_maps import CReLUConv, DoublyConv, MultiBias, crelu, doubly_convolution, multi_bias

__all__ = [
    "CReLUConv",
    "CyclicConv",
    "DepthwiseSeparable",
    "DoublyConv",
    "FFTConv",
    "Fire",
    "GroupConv",
    "GroupedConv",
    "InvertedResidual",
    "LiftConv",
    "MultiBias",
    "SplitRecurrentConv",
    "SqueezeExcite",
    "WinogradConv",
    "channel_shuffle",
    "crelu",
    "cyclic_pool",
    "cyclic_roll",
    "cyclic_slice",
    "cyclic_stack",
    "depthwise_kernels",
    "depthwise_separable",
    "doubly_convolution",
    "fft_convolution",
    "fire",
    "group_convolution",
    "grouped_convolution",
    "grouped_kernel",
    "inverted_residual",
    "lift_convolution",
    "multi_bias",
    "split_recurrent",
    "squeeze_excite",
    "transform_plane",
    "winograd_convolution",
]
