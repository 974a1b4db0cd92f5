"""Reads any JAX function by its jaxpr: what meets which parameter, what it costs, and what must be cut together.

The verbs stand at the top: ``jc.calibrate``, ``jc.shrink``, ``jc.accelerate``.
"""

import importlib
from typing import Any

from jcompress.layers.counts import Count
from jcompress.layers.groups import Group, Groups, mask
from jcompress.trace.core.contraction import Product
from jcompress.trace.costs.counts import cost
from jcompress.trace.costs.tables import Cost, CostRow, node_products
from jcompress.trace.coupled.groups import coupling
from jcompress.trace.coupled.resize import Shrunk
from jcompress.trace.coupled.resize import shrink as shrink
from jcompress.trace.execution.acceleration import accelerate as accelerate
from jcompress.trace.execution.execute import Executed, ProductRow, Products
from jcompress.trace.execution.kernels import Kernels
from jcompress.trace.execution.weights import Policy, Range, Weight
from jcompress.trace.recording.calibration import calibrate as calibrate
from jcompress.trace.recording.observation import observe
from jcompress.trace.recording.positions import position_weights
from jcompress.trace.recording.products import features
from jcompress.trace.recording.roles import Layouts, layout
from jcompress.trace.recording.statistics import Calibration, Outputs, Stats

__all__ = [
    "Calibration",
    "Cost",
    "CostRow",
    "Count",
    "Executed",
    "Group",
    "Groups",
    "Kernels",
    "Layouts",
    "Outputs",
    "Policy",
    "Product",
    "ProductRow",
    "Products",
    "Range",
    "Shrunk",
    "Stats",
    "Weight",
    "cost",
    "coupling",
    "features",
    "layout",
    "mask",
    "node_products",
    "observe",
    "position_weights",
]


def __getattr__(name: str) -> Any:
    """``jc.compress_sequentially`` under the name that it had before it was a verb."""
    if name == "compress_sequentially":
        return importlib.import_module("jcompress").compress_sequentially
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
