"""Reads any JAX function through its jaxpr: what meets which parameter, what it costs, and what must be cut together."""
