"""Penalties that lead to zeros, or to minima that bear them, and the transforms that apply them.

A penalty has a value, ``penalty(x)``, and a proximal operator, ``penalty.prox(x, step)``, the minimum over v of
``||v - x||**2 / 2 + step * penalty(v)``, which :func:`proximal` applies after each step.
"""

from jcompress.prune.penalties.curvature import hessian_square_norm
from jcompress.prune.penalties.descent import AcceleratedState, accelerated, proximal
from jcompress.prune.penalties.norms import L1, ElasticNet, GroupLasso, GrOWL, Penalty
from jcompress.prune.penalties.nuclear import NuclearNorm
from jcompress.prune.penalties.tails import NoiseState, add_stable_noise, stable

__all__ = [
    "L1",
    "AcceleratedState",
    "ElasticNet",
    "GrOWL",
    "GroupLasso",
    "NoiseState",
    "NuclearNorm",
    "Penalty",
    "accelerated",
    "add_stable_noise",
    "hessian_square_norm",
    "proximal",
    "stable",
]
