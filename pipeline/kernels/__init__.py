"""Primitives that statistics are made of, and the kernels that compute the union of them in one pass."""
