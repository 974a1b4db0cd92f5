"""Masks that move while the network trains: sparse training, learned masks, lottery tickets."""

from jcompress.prune.dynamic.annealing import asap, gates
from jcompress.prune.dynamic.exchange import SET, RigL, Static
from jcompress.prune.dynamic.growth import NeST
from jcompress.prune.dynamic.held import lay, masks_of
from jcompress.prune.dynamic.leaves import Leaf, Rule
from jcompress.prune.dynamic.redistribution import DSR, SparseMomentum
from jcompress.prune.dynamic.reparametrization import STR
from jcompress.prune.dynamic.rewiring import deep_rewiring
from jcompress.prune.dynamic.supermasks import EdgePopup, Movement, Piggyback, score_penalty, select
from jcompress.prune.dynamic.tickets import EarlyBird, Ticket, early_bird, lottery_ticket, mask_distance
from jcompress.prune.dynamic.training import sparse
from jcompress.prune.dynamic.views import LatentView, Surgery, TopKAST, latent

__all__ = [
    "DSR",
    "SET",
    "STR",
    "EarlyBird",
    "EdgePopup",
    "LatentView",
    "Leaf",
    "Movement",
    "NeST",
    "Piggyback",
    "RigL",
    "Rule",
    "SparseMomentum",
    "Static",
    "Surgery",
    "Ticket",
    "TopKAST",
    "asap",
    "deep_rewiring",
    "early_bird",
    "gates",
    "latent",
    "lay",
    "lottery_ticket",
    "mask_distance",
    "masks_of",
    "score_penalty",
    "select",
    "sparse",
]
