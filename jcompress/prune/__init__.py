"""Methods that choose masks. A mask's True means keep; ``sparsity`` is the fraction of zeros."""

from jcompress.prune import bayesian, curvature, dynamic, noise, pareto, proximal, scores, search, structured
from jcompress.prune.bayesian import (
    AnnealedChannels,
    BayesianCompression,
    HardConcrete,
    InformationBottleneck,
    NormalJeffreys,
    VariationalDropout,
)
from jcompress.prune.history import AccumulatedScores, accumulate, karnin, weight_elimination
from jcompress.prune.magnitude import Magnitude
from jcompress.prune.network_scores import fourier_variance, grasp, unit_fisher, variance_nullity
from jcompress.prune.obs import OBS, inverse_hessian, obs_saliency, obs_step
from jcompress.prune.patterns import NM, Block, Shared
from jcompress.prune.random import Random
from jcompress.prune.saliency import OBD, SNIP, Fisher, Taylor
from jcompress.prune.sampling import Sampled, sampled
from jcompress.prune.scored import ByScore
from jcompress.prune.sparsegpt import SparseGPT
from jcompress.prune.synaptic import synflow, synflow_scores
from jcompress.prune.threshold import keep_largest
from jcompress.prune.wanda import Wanda

__all__ = [
    "NM",
    "OBD",
    "OBS",
    "SNIP",
    "AccumulatedScores",
    "AnnealedChannels",
    "BayesianCompression",
    "Block",
    "ByScore",
    "Fisher",
    "HardConcrete",
    "InformationBottleneck",
    "Magnitude",
    "NormalJeffreys",
    "Random",
    "Sampled",
    "Shared",
    "SparseGPT",
    "Taylor",
    "VariationalDropout",
    "Wanda",
    "accumulate",
    "bayesian",
    "curvature",
    "dynamic",
    "fourier_variance",
    "grasp",
    "inverse_hessian",
    "karnin",
    "keep_largest",
    "noise",
    "obs_saliency",
    "obs_step",
    "pareto",
    "proximal",
    "sampled",
    "scores",
    "search",
    "structured",
    "synflow",
    "synflow_scores",
    "unit_fisher",
    "variance_nullity",
    "weight_elimination",
]
