"""Penalties that lead to zeros, or to minima that bear them, and the transforms that apply them."""

from jcompress.prune.penalties import curvature, noise, proximal

__all__ = ["curvature", "noise", "proximal"]
