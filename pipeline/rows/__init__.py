"""Rows of Parquet and Arrow files: what is known first, row groups read whole, columns as tensors, batches, ledger."""
