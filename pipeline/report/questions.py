"""The questions that every census answers, as SQL on its tables: printed after a run and by `query --question NAME`.

Layer 5. Each compares trained models with their controls, because a number about patterns means nothing alone: with
what the same run measured of them, since a later run may have measured a twin that several models share on other rows.
"""

from __future__ import annotations

from pipeline.errors import JobError, nearest
from pipeline.report.collapse import COLLAPSE
from pipeline.report.question import FIRES, ONE_SPLIT, TRAINED, TWIN, Question

_PATTERNS = Question(
    name="patterns",
    title="How much did training raise cos(Cov(a, x), w)?",
    reading=(
        "Means over units whose untrained twin was measured by the same run. before: the twin. other_units: |cos| with "
        "the other units' patterns of the trained site, the null. share_raised: units whose cosine is higher than "
        "their twin's."
    ),
    needs=("template_cos", "template_cos_other_mean"),
    sql=f"""WITH {ONE_SPLIT}
SELECT trained.family, unit.site, count(*) AS units,
       avg(twin.template_cos) AS before,
       avg(unit.template_cos) AS after,
       avg(unit.template_cos) - avg(twin.template_cos) AS raised_by,
       avg(unit.template_cos_other_mean) AS other_units,
       avg((unit.template_cos > twin.template_cos)::INT) AS share_raised,
       unit.data || '/' || unit.split AS measured_on
FROM neurons AS unit
JOIN measured USING (run, model, data, split)
JOIN models AS trained USING (run, model, data)
{TWIN}
JOIN sites ON (sites.run, sites.model, sites.data, sites.site) = (unit.run, unit.model, unit.data, unit.site)
WHERE isfinite(unit.template_cos) AND isfinite(twin.template_cos)
GROUP BY trained.family, unit.site, measured_on
ORDER BY trained.family, min(sites.position), unit.site, measured_on
""",
)

_IDLE = Question(
    name="idle",
    title="Which units are dead, or have a near-twin?",
    reading=(
        "Trained models. dead: fired for none of the rows measured, of any split. near_twins: a unit and its nearest "
        "of the site, where the cosine of their patterns is above 0.95; closest: the greatest cosine of any two."
    ),
    needs=("dead", "neighbour_unit", "neighbour_cos"),
    sql=f"""WITH {TRAINED},
units AS (
    SELECT run, model, data, site, unit, bool_and(dead) AS dead,
           any_value(neighbour_unit) AS neighbour, any_value(neighbour_cos) AS cosine
    FROM neurons GROUP BY ALL
)
SELECT name || of_run AS model, site, data, count(*) AS units,
       count(*) FILTER (dead) AS dead,
       coalesce(string_agg(unit, ' ' ORDER BY unit) FILTER (dead), '') AS dead_units,
       max(cosine) FILTER (isfinite(cosine)) AS closest,
       coalesce(array_to_string([pair[1] || '~' || pair[2] FOR pair IN list_sort(
           list(DISTINCT [least(unit, neighbour), greatest(unit, neighbour)])
           FILTER (cosine > 0.95 AND isfinite(cosine)))], ' '), '') AS near_twins
FROM units JOIN trained USING (run, model, data)
GROUP BY run, trained.model, name, of_run, site, data
HAVING count(*) FILTER (dead) > 0 OR max(cosine) FILTER (isfinite(cosine)) > 0.95
ORDER BY dead DESC, name, run, site, data
""",
)

_DETECTORS = Question(
    name="detectors",
    title="Which unit best detects which class?",
    reading=(
        "Trained models. iou: rows of the class at which the unit fires, of all rows that are either. null_iou: the "
        "same for the class it detects best when labels are drawn at random."
    ),
    needs=("best_class_iou_null",),
    sql=f"""WITH {ONE_SPLIT},{TRAINED},
hits AS (
    SELECT *, sum(fired) OVER (PARTITION BY run, model, data, split, site, unit) AS fires
    FROM classes JOIN measured USING (run, model, data, split) WHERE fired IS NOT NULL AND n > 0
)
SELECT hits.class, name || of_run AS model, site, unit,
       hits.fired / (hits.n + hits.fires - hits.fired) AS iou,
       hits.fired / hits.fires AS precision, hits.fired / hits.n AS recall,
       neurons.best_class_iou_null AS null_iou, data || '/' || split AS measured_on
FROM hits
JOIN neurons USING (run, model, data, split, site, unit)
JOIN trained USING (run, model, data)
QUALIFY row_number() OVER (PARTITION BY data, split, hits.class ORDER BY iou DESC, name, run, site, unit) = 1
ORDER BY measured_on, hits.class
""",
)

_FAMILIES = Question(
    name="families",
    title="Does training raise cos(Cov(a, x), w) in every family?",
    reading=(
        "Means over units whose untrained twin was measured by the same run; units that fire are those in front of a "
        "nonlinearity. before: the twin. "
        "other_units and permuted: |cos| with other units' patterns, and with permuted ones. share_raised: units whose "
        "cosine is higher than their twin's. errors: the rise in standard errors of the mean of paired differences."
    ),
    needs=("template_cos", "template_cos_other_mean", "template_cos_permuted_mean"),
    always=False,
    sql=f"""WITH {ONE_SPLIT},
paired AS (
    SELECT trained.family, {FIRES} AS fires, unit.template_cos AS after, twin.template_cos AS before,
           unit.template_cos_other_mean AS other, unit.template_cos_permuted_mean AS permuted
    FROM neurons AS unit
    JOIN measured USING (run, model, data, split)
    JOIN models AS trained USING (run, model, data)
    {TWIN}
    JOIN sites ON (sites.run, sites.model, sites.data, sites.site) = (unit.run, unit.model, unit.data, unit.site)
    WHERE isfinite(unit.template_cos) AND isfinite(twin.template_cos)
)
SELECT family, CASE WHEN fires THEN 'fire' ELSE 'linear' END AS units, count(*) AS count, avg(before) AS before,
       avg(after) AS after, avg(after - before) / stddev_samp(after - before) * sqrt(count(*)) AS errors,
       avg((after > before)::INT) AS share_raised,
       avg(other) FILTER (isfinite(other)) AS other_units, avg(permuted) FILTER (isfinite(permuted)) AS permuted
FROM paired GROUP BY ALL ORDER BY family, units
""",
)

# terms of either sign, and units of each family: of a training those of its last checkpoint, and of weights that were
# shown several data sets, each unit where it is best
_TERMS, _UNITS = 3, 3

_WORDS = Question(
    name="words",
    title="What do three neurons of each family look for?",
    reading=(
        "Of the first site that fires, the trained units whose pattern is most like what drives them: cos; of each "
        "training its last checkpoint. looks_for, not_for: the inputs of the greatest positive and the most negative "
        "weights; where a site sees things embedded (tokens, values of fields), those of such w·x."
    ),
    needs=("template_cos",),
    always=False,
    sql=f"""WITH {ONE_SPLIT},{TRAINED},
first AS (
    SELECT run, model, data, site, input_kind, input_shape, input_names, fan_in
    FROM sites WHERE interpreted AND {FIRES}
    QUALIFY row_number() OVER (PARTITION BY run, model, data ORDER BY position) = 1
),
final AS (
    SELECT * FROM trained
    QUALIFY step IS NOT DISTINCT FROM max(step) OVER (PARTITION BY coalesce(lineage, sha256))
),
best AS (
    SELECT family, name, of_run, sha256, unit.*, first.* EXCLUDE (run, model, data, site)
    FROM neurons AS unit
    JOIN measured USING (run, model, data, split)
    JOIN first USING (run, model, data, site)
    JOIN final USING (run, model, data)
    WHERE isfinite(template_cos)
    QUALIFY row_number() OVER (PARTITION BY run, model, data ORDER BY template_cos DESC, unit) <= {_UNITS}
),
each_once AS (
    SELECT * FROM best
    QUALIFY row_number() OVER (PARTITION BY sha256, site, unit ORDER BY template_cos DESC, data, name, run) = 1
),
chosen AS (
    SELECT * FROM each_once
    QUALIFY row_number() OVER (PARTITION BY family ORDER BY template_cos DESC, name, run, unit) <= {_UNITS}
),
numbered AS (
    SELECT chosen.*, unnest(weight) AS value, generate_subscripts(weight, 1) - 1 AS i
    FROM chosen JOIN patterns USING (run, model, data, split, site, unit)
),
weights AS (
    SELECT run, model, data, site, unit, value,
           CASE WHEN input_names IS NOT NULL THEN input_names[i + 1]
                WHEN input_kind IN ('pixels', 'lags') AND len(input_shape) > 1 THEN concat_ws(', ',
                     CASE WHEN input_shape[1] > 1 THEN 'channel ' || i // (fan_in // input_shape[1]) END,
                     CASE WHEN len(input_shape) > 3
                          THEN 'slice ' || i // input_shape[-1] // input_shape[-2] % input_shape[-3] END,
                     CASE WHEN len(input_shape) > 2 THEN 'row ' || i // input_shape[-1] % input_shape[-2] END,
                     CASE input_kind WHEN 'pixels' THEN 'column ' ELSE 'tap ' END || i % input_shape[-1])
                ELSE regexp_replace(coalesce(input_kind, 'inputs'), 's$', '') || ' ' || i END AS input
    FROM numbered
),
terms AS (
    SELECT DISTINCT run, model, data, site, unit, input, value
    FROM meanings JOIN chosen USING (run, model, data, site, unit)
    UNION ALL
    SELECT run, model, data, site, unit, input, value
    FROM weights ANTI JOIN meanings USING (run, model, data, site, unit)
),
said AS (
    SELECT run, model, data, site, unit,
           list(input ORDER BY value DESC, input) FILTER (value > 0) AS looks_for,
           list(input ORDER BY value, input) FILTER (value < 0) AS not_for
    FROM terms GROUP BY ALL
)
SELECT name || '/' || site || '/' || unit || of_run AS neuron,
       coalesce(array_to_string(looks_for[:{_TERMS}], '; '), '') AS looks_for,
       coalesce(array_to_string(not_for[:{_TERMS}], '; '), '') AS not_for, template_cos AS cos
FROM chosen JOIN said USING (run, model, data, site, unit)
ORDER BY family, template_cos DESC, neuron
""",
)

QUESTIONS = {question.name: question for question in (_PATTERNS, _IDLE, _DETECTORS, COLLAPSE, _FAMILIES, _WORDS)}


def choose(sql: str | None, name: str | None) -> Question:
    """The question in SQL, or the one of this name; JobError unless exactly one of them is given and known."""
    if (sql is None) == (name is None):
        raise JobError(f"expected either SQL or --question NAME; {nearest('', QUESTIONS)}")
    if name is None:
        return Question(sql=sql or "")
    if name not in QUESTIONS:
        raise JobError(f"there is no question {name!r}: {nearest(name, QUESTIONS)}")
    return QUESTIONS[name]
