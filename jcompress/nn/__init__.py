"""Compact filters and dynamic networks: functions of arrays, and Flax NNX modules that hold their parameters.

Features stand as in Flax, (batch, positions..., channels), and kernels as (window..., inputs, outputs). Flax is
imported when this room is first asked for.
"""

from jcompress.nn.attention_sharing import SharedAttention, attention_owners, map_divergence
from jcompress.nn.blocks import Fire, InvertedResidual, SqueezeExcite, fire, inverted_residual, squeeze_excite
from jcompress.nn.capacity import DynamicCapacity, dynamic_capacity, entropy_saliency
from jcompress.nn.cyclic import CyclicConv, cyclic_pool, cyclic_roll, cyclic_slice, cyclic_stack
from jcompress.nn.dropped_blocks import (
    GatedBlocks,
    StochasticDepth,
    gated_blocks,
    gumbel_gates,
    reinforce_loss,
    separated_stochastic_depth,
    stochastic_depth,
    survival_rates,
)
from jcompress.nn.equivariant import GroupConv, LiftConv, group_convolution, lift_convolution, transform_plane
from jcompress.nn.exits import (
    EarlyExit,
    Exits,
    calibrate_exits,
    early_exit,
    exit_entropy,
    exit_loss,
    exits_at,
    first_exit,
)
from jcompress.nn.experts import SparseExperts, balance_loss, noisy_top_k, sparse_experts
from jcompress.nn.fast_filters import FFTConv, WinogradConv, fft_convolution, winograd_convolution
from jcompress.nn.halting import AdaptiveSteps, adaptive_steps
from jcompress.nn.implicit import equilibrium
from jcompress.nn.pooling import DetailPreservingPool, detail_preserving_pool, s3pool
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
from jcompress.nn.slimmable import SlimmableBatchNorm, SlimmableConv, slim_channels, slim_convolution

__all__ = [
    "AdaptiveSteps",
    "CReLUConv",
    "CyclicConv",
    "DepthwiseSeparable",
    "DetailPreservingPool",
    "DoublyConv",
    "DynamicCapacity",
    "EarlyExit",
    "Exits",
    "FFTConv",
    "Fire",
    "GatedBlocks",
    "GroupConv",
    "GroupedConv",
    "InvertedResidual",
    "LiftConv",
    "MultiBias",
    "SharedAttention",
    "SlimmableBatchNorm",
    "SlimmableConv",
    "SparseExperts",
    "SplitRecurrentConv",
    "SqueezeExcite",
    "StochasticDepth",
    "WinogradConv",
    "adaptive_steps",
    "attention_owners",
    "balance_loss",
    "calibrate_exits",
    "channel_shuffle",
    "crelu",
    "cyclic_pool",
    "cyclic_roll",
    "cyclic_slice",
    "cyclic_stack",
    "depthwise_kernels",
    "depthwise_separable",
    "detail_preserving_pool",
    "doubly_convolution",
    "dynamic_capacity",
    "early_exit",
    "entropy_saliency",
    "equilibrium",
    "exit_entropy",
    "exit_loss",
    "exits_at",
    "fft_convolution",
    "fire",
    "first_exit",
    "gated_blocks",
    "group_convolution",
    "grouped_convolution",
    "grouped_kernel",
    "gumbel_gates",
    "inverted_residual",
    "lift_convolution",
    "map_divergence",
    "multi_bias",
    "noisy_top_k",
    "reinforce_loss",
    "s3pool",
    "separated_stochastic_depth",
    "slim_channels",
    "slim_convolution",
    "sparse_experts",
    "split_recurrent",
    "squeeze_excite",
    "stochastic_depth",
    "survival_rates",
    "transform_plane",
    "winograd_convolution",
]
