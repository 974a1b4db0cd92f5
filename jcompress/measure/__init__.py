"""What compression did: the report, simple ratios, latency, and the picture of accuracy against bytes."""

from jcompress.measure.behaviour import add_noise, agreement, robustness, shift
from jcompress.measure.energies import EnergyModel, energy
from jcompress.measure.fronts import Point, non_dominated
from jcompress.measure.layers import average_path_length, block_influence, cosine, layer_similarity
from jcompress.measure.picture import pareto
from jcompress.measure.ratios import compression_ratio, space_saving, sparsity
from jcompress.measure.rows import Row
from jcompress.measure.similarity import gaussian_wasserstein, linear_cka
from jcompress.measure.table import Report
from jcompress.measure.table import report as report
from jcompress.measure.timing import Latency, latency
from jcompress.numeric.dominance import crowding, hypervolume, ranks

__all__ = [
    "EnergyModel",
    "Latency",
    "Point",
    "Report",
    "Row",
    "add_noise",
    "agreement",
    "average_path_length",
    "block_influence",
    "compression_ratio",
    "cosine",
    "crowding",
    "energy",
    "gaussian_wasserstein",
    "hypervolume",
    "latency",
    "layer_similarity",
    "linear_cka",
    "non_dominated",
    "pareto",
    "ranks",
    "robustness",
    "shift",
    "space_saving",
    "sparsity",
]
