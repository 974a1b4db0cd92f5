"""Pruning from posteriors: stochastic gates, their penalties, and priors with structure."""

from jcompress.prune.bayesian.compression import BayesianCompression, NormalJeffreys
from jcompress.prune.bayesian.methods import (
    AnnealedChannels,
    HardConcrete,
    InformationBottleneck,
    VariationalDropout,
)
from jcompress.prune.bayesian.support import SupportPosterior, chain_posterior, gaussian_evidence, structured_posterior
from jcompress.prune.bayesian.trees import at_step, bit_widths, local_reparametrization, penalty

__all__ = [
    "AnnealedChannels",
    "BayesianCompression",
    "HardConcrete",
    "InformationBottleneck",
    "NormalJeffreys",
    "SupportPosterior",
    "VariationalDropout",
    "at_step",
    "bit_widths",
    "chain_posterior",
    "gaussian_evidence",
    "local_reparametrization",
    "penalty",
    "structured_posterior",
]
