"""The columns that are nobody's statistic: whose row it is, and the tables of models, sites and receipts.

Layer 1: imports nothing but the column.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pipeline.columns import Column, DType


def _of(
    table: str,
    *columns: tuple[str, DType, str] | tuple[str, DType, str, str],
    units: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Column, ...]:
    """Columns from (name, type, meaning) or (name, type, meaning, when it is null); `units` of those that measure."""
    return tuple(
        Column(
            name=name,
            dtype=dtype,
            meaning=meaning,
            unit=units.get(name, ""),
            null=rest[0] if rest else "never",
            table=table,
        )
        for name, dtype, meaning, *rest in columns
    )


def unit_keys(table: str) -> tuple[Column, ...]:
    """The columns that say whose row it is, in every table of units."""
    return _of(
        table,
        ("run", "string", "id of the run that wrote the row: digest of job, models, chunks and statistics"),
        ("model", "string", "id of the model: digest of its recipe, or of its weights if it was loaded"),
        ("data", "string", "name of the data set in the job"),
        ("split", "string", "split of the data set that was measured"),
        ("site", "string", "name of the site: path of the module that owns the weight, #k for its k-th call"),
        ("unit", "int32", "number of the unit (output channel) in its site, from 0"),
    )


_MODELS = _of(
    "models",
    ("run", "string", "id of the run that wrote the row"),
    ("model", "string", "id of the model: digest of its recipe, or of its weights if it was loaded"),
    (
        "name",
        "string",
        "name of the model: that of its entry in the job with its seed or file; -init for an untrained twin",
    ),
    ("family", "string", "how it is built: its family, or the class or kind of a loaded one", "null for a program"),
    ("data", "string", "name of the data set that it was trained on, or only measured"),
    ("seed", "int64", "seed of initialisation and row order", "null for a loaded model"),
    ("step", "int64", "optimiser steps taken: 0 is the model before training", "null where unknown"),
    (
        "stopped",
        "int64",
        "step at which training ended early; the weights are those of the least held-out loss until then",
        "null where it did not",
    ),
    ("lineage", "string", "what all checkpoints of one training share", "null for a loaded model"),
    (
        "control",
        "string",
        "id of its untrained twin: rows of the same run and data set are to be compared, other models may share it",
        "null where it has none",
    ),
    (
        "control_of",
        "string",
        "lineage (of several that begin with the same weights, the first), or architecture of loaded models, whose "
        "untrained twin it is",
        "null otherwise",
    ),
    ("hyperparameters", "string", "hyperparameters of the family, or arguments that it is built with, as JSON"),
    ("training", "string", "training recipe as JSON", "null for a loaded model"),
    ("loaded_from", "string", "files that it was loaded from, as the job names them", "null where it was made here"),
    ("parameters", "int64", "numbers in its parameters", "null where it failed"),
    (
        "train_accuracy",
        "float64",
        "share of training rows whose greatest output is their label, of 4,096 drawn by uid where there are more",
        "null where unknown",
    ),
    ("train_loss", "float64", "mean cross-entropy of the same rows, in nats", "null where unknown"),
    ("sha256", "string", "SHA-256 of the checkpoint as stored", "null where it failed"),
    ("status", "string", "ok, or failed: it could not be built, trained, loaded or run"),
    ("reason", "string", "why it failed", "null where it did not"),
    units={"step": "steps", "stopped": "steps", "parameters": "numbers", "train_accuracy": "1", "train_loss": "nat"},
)

_SITES = _of(
    "sites",
    ("run", "string", "id of the run that wrote the row"),
    ("model", "string", "id of the model"),
    ("data", "string", "name of the data set whose rows showed the sites"),
    ("site", "string", "name of the site, or of a weight that is not interpreted"),
    ("position", "int32", "order in the forward pass, from 0", "null where not interpreted"),
    ("path", "string", "path of the module that owns the weight", "null where not interpreted"),
    ("call", "int32", "which call of that module within one forward pass, from 0", "null where not interpreted"),
    ("kind", "string", "kind of affine map: dense, conv2d, …", "null where not interpreted"),
    ("gate", "string", "nonlinearity that consumes the output; identity: none", "null where not interpreted"),
    ("norm", "string", "data-dependent norm between the affine map and the gate", "null where there is none"),
    ("folded", "string", "norms folded into the pattern, by module path", "null where there are none"),
    ("alias_of", "string", "site whose weight it shares", "null where the weight is its own"),
    ("units", "int32", "output channels", "null where not interpreted"),
    ("fan_in", "int32", "numbers in one unit's pattern", "null where not interpreted"),
    ("groups", "int32", "groups of units that share their inputs", "null where not interpreted"),
    ("input_kind", "string", "what a pattern's numbers stand for: pixels, lags, units, features, …", "null if unknown"),
    ("input_shape", "list<int64>", "shape in which a pattern is read", "null where not interpreted"),
    ("input_names", "list<string>", "what each number of a pattern is called", "null where they have no names"),
    ("upstream", "list<string>", "site/unit of each input channel", "null where the data flow does not show it"),
    (
        "receptive_field",
        "list<int64>",
        "what of the model's input a unit sees: size, stride and offset for each axis in turn",
        "null but for convolutions whose field can be followed",
    ),
    ("row_fraction", "float64", "share of the rows that it is measured on, by uid", "null where not interpreted"),
    ("interpreted", "bool", "false: a weight acts here (or never) and is not interpreted"),
    ("reason", "string", "why it is not interpreted, or what is unusual about it", "null where all is as usual"),
    ("parameters", "int64", "numbers in the weight"),
    (
        "error",
        "float64",
        "max |w·x + b − z| / max(‖w‖‖x‖ + |b|) over the probe rows, NaN and infinite ones left out",
        "null where not interpreted, or where nothing finite is left",
    ),
    units={"units": "units", "fan_in": "inputs", "row_fraction": "1", "parameters": "numbers", "error": "1"},
)

_SCORES = _of(
    "scores",
    ("run", "string", "id of the run that wrote the row"),
    ("model", "string", "id of the model"),
    ("data", "string", "name of the data set in the job"),
    ("split", "string", "split of the data set that was measured"),
    (
        "metric",
        "string",
        "accuracy: share of rows whose greatest output is their label; log_loss: mean, in nats; of two classes auc: "
        "the chance that a row of the second has the higher log-odds (to 8 bits; ties count half); of language models, "
        "for which tokens are rows and the next one is the label, perplexity: e to the log_loss",
    ),
    (
        "value",
        "float64",
        "value of the metric",
        "NaN for log_loss and perplexity where any labelled row has an output that is NaN or +∞; to accuracy NaN is "
        "the greatest output",
    ),
    ("rows", "int64", "labelled rows, or tokens, that it is over"),
    units={"value": "nat for log_loss, otherwise 1", "rows": "rows"},
)

_RECEIPTS = _of(
    "receipts",
    ("run", "string", "id of the run that wrote the row"),
    ("model", "string", "id of the model"),
    ("data", "string", "name of the data set in the job"),
    ("split", "string", "split of the data set that was measured"),
    ("chunk", "string", "id of the chunk: digest of the file's content, its row groups and how they are read"),
    ("statistic", "string", "statistic whose state the cell is"),
    ("file", "string", "file that the chunk is part of, as the job names it"),
    ("first_row", "int64", "number of the chunk's first row in the file, from 0"),
    ("key", "string", "where the state is stored, below the root of the store"),
    ("total", "int64", "rows in the chunk's row groups = rows + unreadable + excluded"),
    ("rows", "int64", "rows that were read and measured"),
    ("unreadable", "int64", "rows that could not be read"),
    ("excluded", "int64", "rows of other splits"),
    ("bytes", "int64", "size of the state object"),
    ("sha256", "string", "SHA-256 of the state object as stored"),
    ("device", "string", "kind of device that computed it"),
    units={**dict.fromkeys(("total", "rows", "unreadable", "excluded"), "rows"), "bytes": "bytes"},
)

_MEANINGS = _of(
    "meanings",
    ("run", "string", "id of the run that wrote the row"),
    ("model", "string", "id of the model"),
    ("data", "string", "name of the data set whose words are used"),
    ("site", "string", "name of the site, one that sees things of the model's input embedded"),
    ("unit", "int32", "number of the unit in its site, from 0"),
    ("kind", "string", "greatest or smallest: from which end of all things the rank counts"),
    ("rank", "int32", "place among all things by w·x, from 0"),
    ("input", "string", "the thing: a token, or a value of a field; a number of a field stands for 1"),
    ("value", "float64", "w·x of the thing's embedding as the site would see it alone; of a token behind a plain norm"),
    units={"value": "z"},
)

_CURVES = _of(
    "curves",
    ("run", "string", "id of the run that wrote the row"),
    ("model", "string", "id of the model: of a checkpoint, whose curve ends at its step"),
    ("data", "string", "name of the data set that it was trained on"),
    ("step", "int64", "optimiser steps taken, from 1"),
    (
        "quantity",
        "string",
        "loss: mean training loss of the steps since the point before, in nats; learning_rate; held_out_loss, in nats",
    ),
    ("value", "float64", "its value"),
    units={"step": "steps", "value": "nat for losses, otherwise 1"},
)

_UNREADABLE = _of(
    "unreadable",
    ("run", "string", "id of the run that wrote the row"),
    ("model", "string", "id of the model that was not shown these rows"),
    ("data", "string", "name of the data set in the job"),
    ("split", "string", "split of the data set that was measured"),
    ("chunk", "string", "id of the chunk that they are part of"),
    ("file", "string", "file that they are in, as the job names it"),
    ("row", "int64", "number in the file of the first of them, from 0; of a folder of images its place in the chunk"),
    ("rows", "int64", "how many there are"),
    ("reason", "string", "why they could not be read; of an image in a folder also its path"),
    units={"rows": "rows"},
)

# which of a unit's several rows it is, for the tables that have several
_HISTOGRAM_KEYS = _of(
    "histograms",
    ("quantity", "string", "what is counted: z, pearson, cosine, …"),
    ("bin", "int32", "number of the bin, in ascending order of the values it holds"),
)
_EXEMPLAR_KEYS = _of(
    "exemplars",
    ("kind", "string", "what the rows are chosen by: greatest, smallest, match, random, octave"),
    ("rank", "int32", "place among those chosen, from 0"),
    ("file", "string", "file that the row is in, as the job names it", "null where a column names the rows: uid is it"),
    ("row", "int64", "number of the row in that file, from 0", "null where a column names the rows"),
)
_CLASS_KEYS = _of("classes", ("class", "int32", "number of the class, from 0"))

BASE: dict[str, tuple[Column, ...]] = {
    "models": _MODELS,
    "sites": _SITES,
    "neurons": unit_keys("neurons"),
    "histograms": unit_keys("histograms") + _HISTOGRAM_KEYS,
    "exemplars": unit_keys("exemplars") + _EXEMPLAR_KEYS,
    "classes": unit_keys("classes") + _CLASS_KEYS,
    "patterns": unit_keys("patterns"),
    "edges": unit_keys("edges"),
    "meanings": _MEANINGS,
    "scores": _SCORES,
    "curves": _CURVES,
    "receipts": _RECEIPTS,
    "unreadable": _UNREADABLE,
}


def is_of_units(table: str) -> bool:
    """Whether each row of a table is of a unit on a split, so that statistics may write it.

    >>> is_of_units("classes"), is_of_units("sites"), is_of_units("of_its_own")
    (True, False, True)
    """
    return {key.name for key in unit_keys(table)} <= {column.name for column in BASE.get(table, unit_keys(table))}
