"""Compression under a budget."""

from jcompress.budget.costs import multiply_adds, parameter_count
from jcompress.budget.greedy import Adapted, Round, netadapt

__all__ = ["Adapted", "Round", "multiply_adds", "netadapt", "parameter_count"]
