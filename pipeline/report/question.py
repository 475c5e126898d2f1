"""What a question is, and parts of SQL that several share.

Layer 5: pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, the SQL that answers it, how the answer is read, and the columns that it needs.

    `needs`: columns of `neurons`, or of another table as "table.column".
    `always`: asked after every run; the others are asked by name.
    """

    sql: str
    name: str = ""
    title: str = ""
    reading: str = ""
    needs: tuple[str, ...] = ()
    always: bool = True


# one split of each model on each data set: the test rows if there are any, and the training rows only if no others are
ONE_SPLIT = """
measured AS (
    SELECT run, model, data,
           coalesce(max(split) FILTER (split = 'test'), min(split) FILTER (split <> 'train'), min(split)) AS split
    FROM neurons GROUP BY run, model, data
)"""

# a name is one model's within a run: where several runs have it, of_run says which, as --run takes it
TRAINED = """
trained AS (
    SELECT *, CASE WHEN min(run) OVER same = max(run) OVER same THEN '' ELSE ' (run ' || left(run, 8) || ')' END
           AS of_run
    FROM models WHERE control_of IS NULL AND status = 'ok' WINDOW same AS (PARTITION BY name)
)"""

# as Site.fires has it
FIRES = "gate NOT IN ('identity', 'null', 'fm_square')"

# the same unit of the untrained twin. Not as a tuple: DuckDB compares one that is of two tables row by row
TWIN = """JOIN neurons_all AS twin ON twin.run = unit.run AND twin.model = trained.control AND twin.data = unit.data
     AND twin.split = unit.split AND twin.site = unit.site AND twin.unit = unit.unit"""
