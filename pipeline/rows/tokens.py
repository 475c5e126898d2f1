"""Token sequences: text, or numbers that tokens already are, as int64 (T,): one sequence a row, or packed end to end.

Layer 1: no I/O. Two tokenizers, both stateless but for their vocabulary:

bytes  the UTF-8 bytes of a text; number 256 ends a document
words  of the lower-cased text, every run of letters, digits and "_" is a word, and so is every other sign but white
       space; a word's number is its place in the vocabulary from 2, that of an unknown word 0, and 1 ends a document
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.batch import Batch
from pipeline.hashing import digest, row_hash
from pipeline.names import Names
from pipeline.rows.decode import RowError, whole_numbers
from pipeline.rows.features import Decoded, FeatureFormat, Part, Role, Usable, is_integer, is_list, is_text, narrowest
from pipeline.rows.ragged import Mask, Sequences, lists, of_lengths, padded
from pipeline.rows.reading import Piece
from pipeline.rows.series import masked
from pipeline.rows.tally import UNKNOWN, UNSEEN, Numbering, as_text, in_utf8
from pipeline.rows.texts import Texts, texts

Tokenizer = Literal["bytes", "words", "ids"]

ENDS = {"bytes": 256, "words": 1}
END = "(end)"
NO_TOKEN = "it has no token"
NOT_UTF8 = "its text is not UTF-8"
# numbers of words that no vocabulary holds: unknown, and the end of a document
RESERVED = 2
WINDOW_SEED = 0x70CE
BYTES_PART_ROWS = 1 << 15


@dataclass(frozen=True)
class Tokens(FeatureFormat):
    """At most T tokens of each row, with a mask unless `packed`: then rows of a batch are windows of T tokens.

    `words` is the vocabulary of "words"; `size` the number of different tokens.
    """

    column: str
    shape: tuple[int, ...]
    tokenizer: Tokenizer
    packed: bool
    words: tuple[str, ...]
    size: int

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of text or numbers."""
        return (self.column,)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Tokens, and which of them are real."""
        # no document ends within a row of bytes
        values = ENDS["bytes"] if self._stays else self.size
        return (Part(self.shape, narrowest(values)), Part(self.shape, torch.bool))

    @property
    def identity(self) -> dict[str, Any]:
        """Its fields, the words by their digest."""
        return {"tokens": {one.name: getattr(self, one.name) for one in fields(self)} | {"words": digest(self.words)}}

    @property
    def names(self) -> Names:
        """Words, or bytes as they are printed; given numbers have no other name."""
        match self.tokenizer:
            case "words":
                return Names(tokens=(UNSEEN, END, *self.words))
            case "bytes":
                return Names(tokens=(*(repr(bytes([byte]))[1:] for byte in range(ENDS["bytes"])), END))
            case "ids":
                return Names()

    @property
    def positions(self) -> int | None:
        """Its tokens, unless they are packed."""
        return None if self.packed else self.shape[0]

    def roles(self) -> Iterator[Role]:
        """Text, or lists of whole numbers."""
        if self.tokenizer == "ids":
            yield Role(self.column, "lists of integers", lambda kind: is_list(kind) and is_integer(kind.value_type))
        else:
            yield Role(self.column, "strings", is_text)

    def decode(self, rows: pa.RecordBatch) -> Usable:
        """The tokens of each row, cut behind the T-th; packed, those of all rows and how many are each row's.

        A null, or a row without a token, is not usable. RowError at a number that is no token.
        """
        column = rows[self.column]
        if self._stays:
            return _with_bytes(texts(column))
        given = {"ids": self._given, "bytes": _bytes, "words": self._words}[self.tokenizer](column)
        found = of_lengths(given, 1, 2**62)
        if not found.usable_N.all():
            found = found._replace(reason=given.reason or NO_TOKEN)
        if self.packed:
            return Usable((found.values_VC[:, 0], found.length_N), found.usable_N, found.reason)
        (positions,) = self.shape
        return Usable((padded(found, positions), Mask(found.length_N)), found.usable_N, found.reason, found.length_N)

    def _given(self, column: pa.Array) -> Sequences:
        values, length_N, usable_N = lists(column)
        token_V = whole_numbers(values).fill_null(-1).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((token_V < 0) | (token_V >= self.size))
        if len(wrong):
            row = int(np.searchsorted(length_N.cumsum(), wrong[0], side="right"))
            raise RowError(row, f"token {values[int(wrong[0])].as_py()}: expected 0 to {self.size - 1}")
        return Sequences(token_V[:, None], length_N[usable_N], usable_N, "")

    def _words(self, column: pa.Array) -> Sequences:
        texts = in_utf8(as_text(column))
        values, length_N, usable_N = lists(split_words(texts))
        known_V = self._numbering.of(values)
        token_V = np.where(known_V == UNKNOWN, UNKNOWN, known_V + RESERVED - 1)
        reason = NOT_UTF8 if texts.null_count > column.null_count else ""
        return Sequences(token_V[:, None], length_N[usable_N], usable_N, reason)

    @cached_property
    def _numbering(self) -> Numbering:
        return Numbering(self.words)

    def batch(self, tensors: tuple[torch.Tensor, ...], uid_N: torch.Tensor, label_N: torch.Tensor | None) -> Batch:
        """Tokens, in as few bytes as they need, and their mask."""
        return masked(tensors, uid_N, label_N, narrow=True)

    @property
    def part_rows(self) -> int:
        """More where a text stays what the file has, and decoding it is to find where it begins."""
        return BYTES_PART_ROWS if self._stays else super().part_rows

    @property
    def _stays(self) -> bool:
        return self.tokenizer == "bytes" and not self.packed

    @property
    def keeps_rows(self) -> bool:
        """Not where rows of a batch are windows."""
        return not self.packed

    def repacked(self, pieces: Iterator[Piece[Decoded]]) -> Iterator[Piece[Decoded]]:
        """Packed: the documents of a chunk end to end, cut into windows of T tokens; what is left at its end is padded.

        A window's uid is a hash of the document that it begins in and of where: no row of a file is its row.
        """
        return _windows(pieces, self.shape[0], ENDS.get(self.tokenizer)) if self.packed else pieces


def split_words(column: pa.Array) -> pa.Array:
    """The words of each text, as lists."""
    apart = pc.replace_substring_regex(pc.utf8_lower(as_text(column)), r"([^\pL\pN\pM_\s])", r" \1 ")
    trimmed = pc.utf8_trim_whitespace(apart)
    found = pc.utf8_split_whitespace(trimmed)
    # an empty text is split into one empty word
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar([], found.type), found)


def _bytes(column: pa.Array) -> Sequences:
    texts = as_text(column).cast(pa.binary())
    length_N = pc.binary_length(texts).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    usable_N = texts.is_valid().to_numpy(zero_copy_only=False)
    token_V = _content(texts.drop_null())
    return Sequences(token_V[:, None], length_N[usable_N], usable_N, "")


def _with_bytes(found: Texts) -> Usable:
    """The texts that have a byte, and their masks."""
    usable_N = found.length_N > 0
    if usable_N.all():
        return Usable((found, Mask(found.length_N)), usable_N, "", found.length_N)
    some = found[usable_N]
    return Usable((some, Mask(some.length_N)), usable_N, NO_TOKEN, some.length_N)


def _content(texts: pa.Array) -> np.ndarray:
    """The bytes of all texts one behind the other, as Arrow has them."""
    if not len(texts):
        return np.zeros(0, dtype=np.uint8)
    large = texts.cast(pa.large_binary())
    _, offsets, content = large.buffers()
    place = np.frombuffer(offsets, dtype=np.int64)[large.offset : large.offset + len(large) + 1]
    return np.frombuffer(content, dtype=np.uint8)[place[0] : place[-1]] if content else np.zeros(0, dtype=np.uint8)


def _windows(pieces: Iterator[Piece[Decoded]], positions: int, end: int | None) -> Iterator[Piece[Decoded]]:
    held = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    for piece in pieces:
        token_V, uid_V = (np.concatenate(both) for both in zip(held, _documents(piece, end), strict=True))
        full = len(token_V) // positions * positions
        held = (token_V[full:], uid_V[full:])
        yield _cut_windows(piece, token_V[:full].reshape(-1, positions), uid_V[:full:positions])
    if len(held[0]):
        token_1T = np.zeros((1, positions), dtype=np.int64)
        token_1T[0, : len(held[0])] = held[0]
        yield Piece(1, Decoded((token_1T, Mask(np.array([len(held[0])]))), held[1][:1], None), made_of=0)


def _cut_windows(piece: Piece[Decoded], token_WT: np.ndarray, uid_W: np.ndarray) -> Piece[Decoded]:
    content = Decoded((token_WT, Mask(np.full(len(token_WT), token_WT.shape[1]))), uid_W, None)
    return replace(piece, rows=len(token_WT), content=content, made_of=piece.rows)


def _documents(piece: Piece[Decoded], end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a piece's documents with their ends, and the uid of a window that would begin at each."""
    if not piece.rows:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    token_V, length_N = piece.content.parts
    assert isinstance(token_V, np.ndarray)
    assert isinstance(length_N, np.ndarray)
    total_N = length_N + (end is not None)
    row_V = np.repeat(np.arange(len(total_N)), total_N)
    offset_V = np.arange(len(row_V)) - np.repeat(total_N.cumsum() - total_N, total_N)
    all_V = np.full(len(row_V), end or 0, dtype=np.int64)
    all_V[offset_V < length_N[row_V]] = token_V
    uid_V = torch.from_numpy(piece.content.uid_N[row_V])
    return all_V, row_hash(uid_V, seed=WINDOW_SEED, unit=torch.from_numpy(offset_V)).numpy()
