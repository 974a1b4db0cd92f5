"""Arithmetic that knows nothing of networks: bits and packing, exact thresholds, surrogates, sweeps, shrinkage."""
