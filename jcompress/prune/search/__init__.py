"""Search for masks, by populations, chains or a learned policy: each search is one ``scan`` over a fitness.

A fitness is a function of one mask, boolean (length,), that gives a number, higher is better; populations map over it.
That of ``amc`` is a function of the kept fraction of each layer. It must be traceable, and may call back to the host
(``jax.pure_callback`` with ``vmap_method="sequential"``). A bit may stand for a weight, a channel, a head or a layer:
the fitness says.
"""

from jcompress.prune.search.distributions import n2n_reward, pbil, reinforce
from jcompress.prune.search.evolution import Fitness, Found, Front, genetic, genetic_front, weight_agnostic
from jcompress.prune.search.filtering import Filtered, particle_filter, systematic
from jcompress.prune.search.reinforcement import amc
from jcompress.prune.search.trajectories import anneal, particle_swarm

__all__ = [
    "Filtered",
    "Fitness",
    "Found",
    "Front",
    "amc",
    "anneal",
    "genetic",
    "genetic_front",
    "n2n_reward",
    "particle_filter",
    "particle_swarm",
    "pbil",
    "reinforce",
    "systematic",
    "weight_agnostic",
]
