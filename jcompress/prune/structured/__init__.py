"""Pruning of whole units: neurons, channels, heads.

Three steps, each a pure function. Score the units of each group that must be cut together, choose those that stay, and
let ``jc.trace.mask`` set the others to zero or ``jc.shrink`` cut them out; between, ``jc.rewrite.reconstruct`` and its
kin refit what reads them. While training, :func:`prune_units` does all but the last along a schedule of the cost.
``groups`` come from ``jc.trace.coupling``; in scores the larger value stays.
"""

from jcompress.prune.structured.adversarial import discriminator_loss, generator_loss, scaled
from jcompress.prune.structured.channels import lasso, thinet
from jcompress.prune.structured.choice import keep
from jcompress.prune.structured.eigenvalues import spectral
from jcompress.prune.structured.gradual import UnitsState, kept_units, prune_units
from jcompress.prune.structured.linearization import linearity_penalty, prelu
from jcompress.prune.structured.propagation import apoz, nisp
from jcompress.prune.structured.ranking import hessian, importance, l1, l2, random, slimming, taylor
from jcompress.prune.structured.redundancy import geometric_median
from jcompress.prune.structured.training import add_l1, group_lasso, group_lasso_proximal, soft_filter
from jcompress.prune.structured.walks import diffusion, weighted_penalty

__all__ = [
    "UnitsState",
    "add_l1",
    "apoz",
    "diffusion",
    "discriminator_loss",
    "generator_loss",
    "geometric_median",
    "group_lasso",
    "group_lasso_proximal",
    "hessian",
    "importance",
    "keep",
    "kept_units",
    "l1",
    "l2",
    "lasso",
    "linearity_penalty",
    "nisp",
    "prelu",
    "prune_units",
    "random",
    "scaled",
    "slimming",
    "soft_filter",
    "spectral",
    "taylor",
    "thinet",
    "weighted_penalty",
]
