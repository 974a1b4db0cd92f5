"""Reads any JAX function by its jaxpr: what meets which parameter, what it costs, and what must be cut together."""

from jcompress.trace.acceleration import accelerate
from jcompress.trace.calibration import calibrate
from jcompress.trace.counts import cost
from jcompress.trace.execute import Executed, ProductRow, Products
from jcompress.trace.groups import Group, Groups, coupling, mask
from jcompress.trace.observation import observe
from jcompress.trace.resize import Shrunk, shrink
from jcompress.trace.statistics import Calibration, Outputs, Stats
from jcompress.trace.tables import Cost, CostRow, node_products

__all__ = [
    "Calibration",
    "Cost",
    "CostRow",
    "Executed",
    "Group",
    "Groups",
    "Outputs",
    "ProductRow",
    "Products",
    "Shrunk",
    "Stats",
    "accelerate",
    "calibrate",
    "cost",
    "coupling",
    "mask",
    "node_products",
    "observe",
    "shrink",
]
