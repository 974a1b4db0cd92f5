"""Pruning of whole units: neurons, channels, heads.

Three steps, each a pure function. Score the units of each group that must be cut together, choose those that stay, and
let ``jc.trace.mask`` set the others to zero or ``jc.shrink`` cut them out; between, :func:`reconstruct` and its kin
refit what reads them. ``groups`` come from ``jc.trace.coupling``; in scores the larger value stays.
"""

from jcompress.layers.consumers import beside
from jcompress.layers.units import Group, ManualGroup, within
from jcompress.prune.structured.adversarial import discriminator_loss, generator_loss, scaled
from jcompress.prune.structured.channels import lasso, thinet
from jcompress.prune.structured.choice import keep
from jcompress.prune.structured.clustering import p_pruning
from jcompress.prune.structured.diffusion import diffusion, weighted_penalty
from jcompress.prune.structured.eigenvalues import spectral
from jcompress.prune.structured.propagation import apoz, nisp
from jcompress.prune.structured.ranking import hessian, importance, l1, l2, random, slimming, taylor
from jcompress.prune.structured.redundancy import geometric_median, merge_neurons
from jcompress.prune.structured.training import add_l1, group_lasso, group_lasso_proximal, l1_proximal, soft_filter
from jcompress.rewrite.batch_norm import NormPaths, fold_batch_norm, fold_batch_norms, reestimate
from jcompress.rewrite.biases import correct_biases
from jcompress.rewrite.depth import block_influence, cosine, fuse_layers, layer_similarity, remove_layers
from jcompress.rewrite.linearization import (
    Join,
    average_path_length,
    linearity_penalty,
    merge_convolutions,
    merge_dense,
    prelu,
)
from jcompress.rewrite.reconstruction import fold_constants, liar, reconstruct

__all__ = [
    "Group",
    "Join",
    "ManualGroup",
    "NormPaths",
    "add_l1",
    "apoz",
    "average_path_length",
    "beside",
    "block_influence",
    "correct_biases",
    "cosine",
    "diffusion",
    "discriminator_loss",
    "fold_batch_norm",
    "fold_batch_norms",
    "fold_constants",
    "fuse_layers",
    "generator_loss",
    "geometric_median",
    "group_lasso",
    "group_lasso_proximal",
    "hessian",
    "importance",
    "keep",
    "l1",
    "l1_proximal",
    "l2",
    "lasso",
    "layer_similarity",
    "liar",
    "linearity_penalty",
    "merge_convolutions",
    "merge_dense",
    "merge_neurons",
    "nisp",
    "p_pruning",
    "prelu",
    "random",
    "reconstruct",
    "reestimate",
    "remove_layers",
    "scaled",
    "slimming",
    "soft_filter",
    "spectral",
    "taylor",
    "thinet",
    "weighted_penalty",
    "within",
]
