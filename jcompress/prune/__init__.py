"""Methods that choose masks. A mask's True means keep; ``sparsity`` is the fraction of zeros."""

from jcompress.numeric.threshold import keep_largest
from jcompress.prune import bayesian, dynamic, penalties, scores, search, structured
from jcompress.prune.bayesian.compression import BayesianCompression, NormalJeffreys
from jcompress.prune.bayesian.methods import (
    AnnealedChannels,
    HardConcrete,
    InformationBottleneck,
    VariationalDropout,
)
from jcompress.prune.masks.chance import Random
from jcompress.prune.masks.largest import Magnitude
from jcompress.prune.masks.nonzero import Nonzero
from jcompress.prune.masks.obs import OBS, inverse_hessian, obs_saliency, obs_step
from jcompress.prune.masks.patterns import NM, Block, Shared
from jcompress.prune.masks.saliency import OBD, SNIP, Fisher, Taylor
from jcompress.prune.masks.sampling import Sampled, sampled
from jcompress.prune.masks.scored import ByScore
from jcompress.prune.masks.sparsegpt import SparseGPT
from jcompress.prune.masks.wanda import Wanda
from jcompress.prune.scores.history import AccumulatedScores, accumulate, karnin, weight_elimination
from jcompress.prune.scores.network import fourier_variance, grasp, unit_fisher, variance_nullity
from jcompress.prune.scores.synaptic import synflow, synflow_scores

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
    "Nonzero",
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
    "dynamic",
    "fourier_variance",
    "grasp",
    "inverse_hessian",
    "karnin",
    "keep_largest",
    "obs_saliency",
    "obs_step",
    "penalties",
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
