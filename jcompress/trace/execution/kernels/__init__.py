"""Kernels for products with compressed weights, for TPUs and GPUs; the plain path is their derivative and their test.

They are written in Pallas. Where nothing else is said a kernel is made for both kinds of device.
"""

from jcompress.trace.execution.kernels.choice import Kernels

__all__ = ["Kernels"]
