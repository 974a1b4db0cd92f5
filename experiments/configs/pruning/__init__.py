"""Pruning compared: at 80, 90, 95 and 98 percent zeros, one training budget for all."""
