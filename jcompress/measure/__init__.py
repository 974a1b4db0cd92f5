"""What compression did: the report, simple ratios, latency, and the picture of accuracy against bytes."""

from jcompress.measure.ratios import compression_ratio, space_saving, sparsity
from jcompress.measure.rows import Row
from jcompress.measure.table import Report, report

__all__ = [
    "Report",
    "Row",
    "compression_ratio",
    "report",
    "space_saving",
    "sparsity",
]
