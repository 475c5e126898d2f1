"""What a run came to, and what it found.

Layer 5.
"""

from __future__ import annotations

from contextlib import closing

from rich.console import Console
from rich.text import Text

from pipeline.query import connect
from pipeline.report.answers import print_question
from pipeline.report.questions import QUESTIONS
from pipeline.run import Outcome
from pipeline.store import Store

_ROWS = 20


def print_outcome(outcome: Outcome, store: Store, console: Console) -> None:
    """Print what was done, the answers to the questions of every census, and which models failed."""
    console.print(f"run {outcome.run}: {outcome.done if outcome.new else 'was committed before'}", soft_wrap=True)
    with closing(connect(store, run=outcome.run)) as con:
        for question in filter(lambda one: one.always, QUESTIONS.values()):
            print_question(con, question, console, limit=_ROWS)
    console.print(f"\ntables in {store.url}: ask more with `neuron-census query`, see one with `neuron-census show`")
    for name, reason in sorted(outcome.failed.items()):
        console.print(Text(f"failed: {name}: {reason}", style="bold red"), soft_wrap=True)
