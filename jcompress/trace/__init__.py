"""Reads any JAX function by its jaxpr: what meets which parameter, what it costs, and what must be cut together.

The verbs stand at the top: ``jc.calibrate``, ``jc.shrink``, ``jc.accelerate``.
"""

from jcompress.trace.acceleration import accelerate as accelerate
from jcompress.trace.calibration import calibrate as calibrate
from jcompress.trace.counts import cost
from jcompress.trace.execute import Executed, ProductRow, Products
from jcompress.trace.groups import Group, Groups, coupling, mask
from jcompress.trace.observation import observe
from jcompress.trace.resize import Shrunk
from jcompress.trace.resize import shrink as shrink
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
    "cost",
    "coupling",
    "mask",
    "node_products",
    "observe",
]
