"""Where answers are printed: a terminal of its own width, or a pipe, which has none.

Layer 5: imports nothing of the pipeline.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console

PIPE_WIDTH = 120


def screen(*, err: bool = False) -> Console:
    """Stdout or stderr; a pipe is PIPE_WIDTH columns wide, or COLUMNS."""
    stream = sys.stderr if err else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=err, width=width, highlight=False, markup=False)
