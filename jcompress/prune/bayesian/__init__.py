"""Pruning from posteriors: stochastic gates, their penalties, and priors with structure.

The methods stand beside the others, in :mod:`jcompress.prune`.
"""

from jcompress.prune.bayesian.support import SupportPosterior, chain_posterior, gaussian_evidence, structured_posterior
from jcompress.prune.bayesian.trees import at_step, bit_widths, local_reparametrization, penalty

__all__ = [
    "SupportPosterior",
    "at_step",
    "bit_widths",
    "chain_posterior",
    "gaussian_evidence",
    "local_reparametrization",
    "penalty",
    "structured_posterior",
]
