"""Finds every site of a model by following the data flow of a probe batch, and taps the forward at measure time.

Layer 1: pure torch, no I/O. Start reading at `discover.py` (once per model) and `tap.py` (once per batch).
"""
