"""Compression under a budget."""

from jcompress.budget.costs import multiply_adds, parameter_count
from jcompress.budget.greedy import Adapted, Round, netadapt
from jcompress.budget.sparsity import by_sensitivity, erdos_renyi, erk, global_, lamp, scan, uniform

__all__ = [
    "Adapted",
    "Round",
    "by_sensitivity",
    "erdos_renyi",
    "erk",
    "global_",
    "lamp",
    "multiply_adds",
    "netadapt",
    "parameter_count",
    "scan",
    "uniform",
]
