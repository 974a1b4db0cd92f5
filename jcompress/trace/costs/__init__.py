"""Counts what a function costs, dense and compressed."""
