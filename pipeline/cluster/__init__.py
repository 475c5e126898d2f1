"""Ray: the only package that imports it, and nothing below ever sees it.

Layer 5. A pool of resident workers takes stateless calls, one at a time each: a worker that died is replaced by a new
one with nothing but what its tasks load, and a call may run twice, so nothing is accumulated across calls; results go
to the store, receipts come back. Credentials are those of each machine: none is sent. Start reading at `executor.py`;
runs as jobs of a cluster are in `jobs.py`.
"""

import os

# here, so that they are set before any file of the package imports ray; uv would start every worker through `uv run`
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
