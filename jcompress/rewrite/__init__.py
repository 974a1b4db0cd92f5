"""Changes that keep the function, or change it least: what lies between two layers moved into them, kernels refitted.

Norms, scales, rotations and constants are folded into neighbours; ranges are evened out; biases and kernels are
refitted after a cut; neurons, layers and convolutions are merged; statistics of norms are gathered anew. What feeds
what is said by the groups of ``jc.trace.coupling``, or by groups written by hand.
"""

from jcompress.rewrite.batch_norm import fold_batch_norm, fold_batch_norms, reestimate
from jcompress.rewrite.biases import correct_biases
from jcompress.rewrite.clusters import p_pruning
from jcompress.rewrite.depth import fuse_layers, remove_layers
from jcompress.rewrite.equalization import equalize
from jcompress.rewrite.folding import fold_norms, fold_rotations, fold_scales
from jcompress.rewrite.growing import identity_layer, take_layers, widen
from jcompress.rewrite.matching import match_units
from jcompress.rewrite.merging import merge_convolutions, merge_dense
from jcompress.rewrite.neurons import merge_neurons
from jcompress.rewrite.permutation import permute
from jcompress.rewrite.reconstruction import fold_constants, liar, reconstruct
from jcompress.rewrite.smoothing import smooth

__all__ = [
    "correct_biases",
    "equalize",
    "fold_batch_norm",
    "fold_batch_norms",
    "fold_constants",
    "fold_norms",
    "fold_rotations",
    "fold_scales",
    "fuse_layers",
    "identity_layer",
    "liar",
    "match_units",
    "merge_convolutions",
    "merge_dense",
    "merge_neurons",
    "p_pruning",
    "permute",
    "reconstruct",
    "reestimate",
    "remove_layers",
    "smooth",
    "take_layers",
    "widen",
]
