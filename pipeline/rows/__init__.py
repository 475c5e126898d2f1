"""Rows of Parquet files: what a footer says, row groups read whole, columns as tensors, batches and their ledger."""
