"""Losses and teachers."""

from jcompress.distill.losses import layer_errors, soft_targets

__all__ = ["layer_errors", "soft_targets"]
