"""Prefect flows: the only package that imports it. Only the driver talks to Prefect, never a worker."""
