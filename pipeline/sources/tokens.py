"""Token sequences in Parquet or Arrow files: a column of text that is tokenised, or of lists of the numbers of tokens.

`columns.shape` = [T] says how many tokens a sequence has at most: what is behind them is cut off, what is shorter is
filled up and masked. `options.packed` lays documents end to end instead, so that every sequence is full.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.names import Names
from pipeline.rows.decode import has_fitting_labels
from pipeline.rows.features import FeatureFormat
from pipeline.rows.ragged import lists
from pipeline.rows.tally import Vocabulary, as_text, frequent, in_utf8, stored, tallied
from pipeline.rows.tokens import ENDS, RESERVED, Tokenizer, split_words
from pipeline.rows.tokens import Tokens as TokenFormat
from pipeline.sources.base import FileSource, Options


class TokenOptions(Options):
    """What token sequences take besides."""

    tokenizer: Tokenizer = Field(
        default="bytes", description="bytes or words of text, or ids: the column holds numbers"
    )
    vocabulary: int | None = Field(default=None, ge=2, description="ids: how many there are; words: how many at most")
    min_count: int = Field(default=2, ge=1, description="words: how often one must occur in training rows to be known")
    packed: bool = Field(default=False, description="documents end to end in windows of T tokens; without labels")


class Tokens(FileSource):
    """Rows as token (N, T) with mask (N, T)."""

    name: ClassVar[str] = "tokens"
    parameters: ClassVar[type[Options]] = TokenOptions
    options: TokenOptions

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return self._format_of(self._words).size

    @cached_property
    def names(self) -> Names:  # type: ignore[override]
        """What the format knows; of given numbers what the file says of its column."""
        named = super().names
        return Names(tokens=named.features) if self.options.tokenizer == "ids" else named

    def features(self) -> FeatureFormat:
        """One column of text or of lists."""
        if self.options.packed and self.spec.columns.label is not None:
            raise self.refusal("columns.label", "a window of packed documents has no label; leave it out")
        return self._format_of(self._words)

    def _format_of(self, words: tuple[str, ...]) -> TokenFormat:
        columns, options = self.spec.columns, self.options
        if not isinstance(columns.features, str):
            raise self.refusal("columns.features", "expected the name of one column")
        if columns.shape is None or len(columns.shape) != 1:
            raise self.refusal("columns.shape", "expected the number of tokens of a sequence, shape = [128] say")
        if options.tokenizer == "ids" and options.vocabulary is None:
            raise self.refusal("options.vocabulary", "missing; expected how many different tokens there are")
        sizes = {"ids": options.vocabulary or 0, "bytes": ENDS["bytes"] + 1, "words": len(words) + RESERVED}
        return TokenFormat(
            column=columns.features,
            shape=columns.shape,
            tokenizer=options.tokenizer,
            packed=options.packed,
            words=words,
            size=sizes[options.tokenizer],
        )

    @cached_property
    def _words(self) -> tuple[str, ...]:
        if self.options.tokenizer != "words":
            return ()
        raw = self._format_of(())
        made_of = [self.training_identity, raw.column, self.options.model_dump(mode="json"), self._position_label]
        return stored(self.store, made_of, lambda: self._tallied(raw)).values[raw.column]

    @cached_property
    def _position_label(self) -> str | None:
        """The column with a label for each word, if there is one."""
        return self.spec.columns.label if any(map(self.lists_labels, self.listed)) else None

    def _tallied(self, raw: TokenFormat) -> Vocabulary:
        words = ({raw.column: _words_of(part, raw.column, self._position_label)} for part in self.training_rows(raw))
        counts = tallied(words, (raw.column,), ()).counts[raw.column]
        most = (self.options.vocabulary or 2**31) - RESERVED
        return Vocabulary({raw.column: frequent(counts, least=self.options.min_count, most=most)}, {})


def _words_of(rows: pa.RecordBatch, column: str, label: str | None) -> pa.Array:
    """The words of the readable rows: those that have as many labels as words, where each has one."""
    words, length_N, _ = lists(split_words(in_utf8(as_text(rows[column]))))
    if label not in rows.schema.names:
        return words
    readable_N = has_fitting_labels(rows[label], length_N)
    return words if readable_N.all() else words.filter(pa.array(np.repeat(readable_N, length_N)))


SOURCE = Tokens
