"""The question whether the last layer has collapsed to its class means, of models whose tables can tell.

Layer 5. `classes` has a row's greatest output of each unit, which is what a classifier sees only where no mean, sum,
norm or further nonlinearity comes between: `sites.upstream` says whose units its inputs are, and its own mean output of
each class must be what its weights make of their class means.
"""

from __future__ import annotations

from pipeline.report.question import TRAINED, Question

# of a class's mean output, less what its weights make of its inputs' means, as a share of the greatest that could be:
# 1e-8 in float32, 4e-4 in bfloat16; 1e-2 behind a tanh of small outputs, 0.2 and more behind means and norms
_EXACT = 2.0**-9

COLLAPSE = Question(
    name="collapse",
    title="Has the last layer collapsed to its class means?",
    reading=(
        "Of the classifier's inputs, trained and before. nc1: variance within classes over that between them. nc2: "
        "spread of the cosines between centred class means (0: equal angles). nc3: cosine of a class's row of weights "
        "with its centred mean. Papyan, Han & Donoho 2020. Only of models whose classifier has a unit for each class "
        "and sees of each unit of one layer the greatest output of the row; what others see (means, sums, normed "
        "outputs) is in no table."
    ),
    needs=("patterns.weight", "classes.a_mean"),
    always=False,
    sql=f"""WITH {TRAINED},
compared AS (
    SELECT run, model, data FROM trained WHERE control IS NOT NULL
    UNION SELECT run, control, data FROM trained WHERE control IS NOT NULL
),
places AS (FROM sites_all SEMI JOIN compared USING (run, model, data) WHERE interpreted),
heads AS (
    SELECT run, model, data, head.site AS head, head.units, source.site AS source
    FROM (FROM places QUALIFY row_number() OVER (PARTITION BY run, model, data ORDER BY position DESC) = 1) AS head
    JOIN places AS source USING (run, model, data)
    WHERE head.gate = 'identity' AND head.fan_in = source.units
      AND head.upstream = [source.site || '/' || unit FOR unit IN range(source.units)]
),
weights AS (
    SELECT run, model, data, split, unit AS class, weight::DOUBLE[] AS w, bias
    FROM patterns_all JOIN heads USING (run, model, data) WHERE site = head
),
outputs AS (
    SELECT run, model, data, split, class, a_mean AS output
    FROM classes_all JOIN heads USING (run, model, data) WHERE site = head
    QUALIFY units = 1 + max(class) OVER (PARTITION BY run, model, data) AND class = unit
),
centred AS (
    SELECT classes_all.*, a_mean - avg(a_mean) OVER (PARTITION BY run, model, data, split, unit) AS m
    FROM classes_all JOIN heads USING (run, model, data) WHERE site = source AND n > 0
),
means AS (
    SELECT run, model, data, split, class, list(a_mean ORDER BY unit) AS mean, list(m ORDER BY unit) AS m
    FROM centred GROUP BY ALL
),
exact AS (
    SELECT run, model, data, split
    FROM means JOIN outputs USING (run, model, data, split, class) JOIN weights USING (run, model, data, split, class)
    GROUP BY ALL
    HAVING bool_and(abs(output - list_dot_product(w, mean) - bias)
                    <= {_EXACT} * (sqrt(list_dot_product(w, w) * list_dot_product(mean, mean)) + abs(bias)))
),
within AS (
    SELECT run, model, data, split, sum(n * a_std ** 2) / sum(n * m ** 2) AS nc1 FROM centred GROUP BY ALL
),
angles AS (
    SELECT run, model, data, split, stddev_pop(list_cosine_similarity(one.m, other.m)) AS nc2
    FROM means AS one JOIN means AS other USING (run, model, data, split) WHERE one.class < other.class GROUP BY ALL
),
rows_ AS (
    SELECT run, model, data, split, avg(list_cosine_similarity(w, m)) AS nc3
    FROM weights JOIN means USING (run, model, data, split, class) GROUP BY ALL
),
measures AS (
    FROM within JOIN angles USING (run, model, data, split) JOIN rows_ USING (run, model, data, split)
    SEMI JOIN exact USING (run, model, data, split)
)
SELECT name || of_run AS model, data, after.split, after.nc1, before.nc1 AS nc1_before,
       after.nc2, before.nc2 AS nc2_before, after.nc3, before.nc3 AS nc3_before
FROM measures AS after JOIN trained USING (run, model, data)
JOIN measures AS before ON (before.run, before.model, before.data, before.split)
                         = (after.run, trained.control, after.data, after.split)
ORDER BY ALL
""",
)
