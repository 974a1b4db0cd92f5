"""Compression under a budget."""

from jcompress.budget.allocation import Options, allocate, bit_operations, bits, mixed, multiply_adds, options
from jcompress.budget.costs import parameter_count
from jcompress.budget.errors import (
    by_loss,
    curvature_error,
    loss_change,
    measure_of,
    output_error,
    top_eigenvalues,
    weight_error,
)
from jcompress.budget.greedy import Adapted, Round, netadapt
from jcompress.budget.levels import by_sensitivity, erdos_renyi, erk, global_, lamp, scan, uniform
from jcompress.budget.searching import Evaluation, SearchResult
from jcompress.budget.searching import search as search

__all__ = [
    "Adapted",
    "Evaluation",
    "Options",
    "Round",
    "SearchResult",
    "allocate",
    "bit_operations",
    "bits",
    "by_loss",
    "by_sensitivity",
    "curvature_error",
    "erdos_renyi",
    "erk",
    "global_",
    "lamp",
    "loss_change",
    "measure_of",
    "mixed",
    "multiply_adds",
    "netadapt",
    "options",
    "output_error",
    "parameter_count",
    "scan",
    "top_eigenvalues",
    "uniform",
    "weight_error",
]
