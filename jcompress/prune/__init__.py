"""Methods that choose masks. A mask's True means keep; ``sparsity`` is the fraction of zeros."""

from jcompress.prune import bayesian, curvature, dynamic, noise, pareto, proximal, scores, search, structured
from jcompress.prune.bayesian import (
    AnnealedChannels,
    BayesianCompression,
    HardConcrete,
    InformationBottleneck,
    VariationalDropout,
)
from jcompress.prune.magnitude import Magnitude
from jcompress.prune.patterns import NM, Block, Shared
from jcompress.prune.random import Random
from jcompress.prune.scored import ByScore
from jcompress.prune.threshold import keep_largest

__all__ = [
    "NM",
    "AnnealedChannels",
    "BayesianCompression",
    "Block",
    "ByScore",
    "HardConcrete",
    "InformationBottleneck",
    "Magnitude",
    "Random",
    "Shared",
    "VariationalDropout",
    "bayesian",
    "curvature",
    "dynamic",
    "keep_largest",
    "noise",
    "pareto",
    "proximal",
    "scores",
    "search",
    "structured",
]
