"""Losses and teachers."""

from jcompress.distill.losses import soft_targets

__all__ = ["soft_targets"]
