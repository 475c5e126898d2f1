"""Folders of image files: `url`/CLASS/FILE, or `url`/SPLIT/CLASS/FILE where the job names splits (`train`, `measure`).

A file is a row: its uid is a hash of its path below `url`. A chunk is the files whose paths' hashes are alike: a new
file changes its own chunk only, and all of them where the number of files passes a power of two times `chunk_rows`.
Files are known by their content: by SHA-256 where they are local, else by size and ETag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.errors import DataError, nearest
from pipeline.hashing import digest, sha256
from pipeline.inputs import InputFile, list_inputs, open_input
from pipeline.rows.decode import key_uids
from pipeline.rows.features import Decoded
from pipeline.rows.format import RowFormat
from pipeline.rows.pictures import MODES, Pictures
from pipeline.rows.reading import Piece, Reading, Unreadable
from pipeline.sources.base import READ_VERSION, Chunk, Options, Source

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# files read and decoded at a time
PART_FILES = 64
READERS = 16


class FolderOptions(Options):
    """What folders of images take besides."""

    resize: bool = Field(default=False, description="bring images of another size to H × W; else they are unreadable")


class ImageFolder(Source):
    """Rows as x (N, C, H, W) from 0 to 1, labelled with their folder's place among `labels`, or among all folders."""

    name: ClassVar[str] = "image_folder"
    parameters: ClassVar[type[Options]] = FolderOptions
    options: FolderOptions

    @property
    def shape(self) -> tuple[int, ...]:
        """`columns.shape`."""
        shape = self.spec.columns.shape
        if shape is None or len(shape) != 3 or shape[0] not in MODES:
            raise self.refusal("columns.shape", "expected channels (1 or 3), height and width, [3, 32, 32] say")
        return shape

    @property
    def classes(self) -> int:
        """How many folders there are."""
        return len(self._labels)

    def chunks(self, split: str) -> tuple[Chunk, ...]:
        """The files of a split by their hashes."""
        rows = self._format(split)
        for path in self._paths(split):
            self._label(path)
        return tuple(self._chunk(rows, part, files) for part, files in self._parts(split).items())

    def splits(self) -> Sequence[str]:
        """The folders right below `url`, where the job names splits."""
        return ("all",) if self._is_whole else sorted({path.split("/")[0] for path in self._files})

    def read(self, chunk: Chunk, batch_rows: int) -> Reading[Any, Any]:
        """Decode a chunk's files, some at a time; one that is no image is unreadable."""
        rows = self._format(chunk.split)
        return Reading(
            where=f"data {self.data}: {chunk.url}",
            rows=chunk.rows,
            fetch=lambda: self._pieces(chunk, rows),
            pieces=iter,
            join=rows.join,
            batch_rows=batch_rows,
            max_unreadable=self.spec.max_unreadable,
        )

    def where(self, chunk: Chunk, uid: int) -> str:
        """The file."""
        paths = self._parts(chunk.split).get(chunk.start, [])
        found = np.flatnonzero(key_uids(pa.array(paths, pa.string())) == uid)
        return f"{chunk.url.rstrip('/')}/{paths[found[0]]}"

    @cached_property
    def _files(self) -> Mapping[str, InputFile]:
        """Every image by its path below `url`."""
        if self.spec.url is None:
            raise self.refusal("url", "missing; expected a directory of image files")
        location = self.spec.location.rstrip("/")
        found = {file.url.removeprefix(location).lstrip("/"): file for file in list_inputs(location)}
        images = {path: file for path, file in found.items() if path.lower().endswith(SUFFIXES)}
        depth = 2 if self._is_whole else 3
        if misplaced := [path for path in images if len(path.split("/")) != depth]:
            expected = "CLASS/FILE" if self._is_whole else "SPLIT/CLASS/FILE"
            raise DataError(f"data {self.data}: {location}/{misplaced[0]}: expected images as {expected} below `url`")
        return images

    @property
    def _is_whole(self) -> bool:
        return {self.spec.train, *self.spec.measure} == {"all"}

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        return self.spec.labels or tuple(sorted({path.split("/")[-2] for path in self._files}))

    def _label(self, path: str) -> int:
        name = path.split("/")[-2]
        if name not in self._labels:
            known = nearest(name, self._labels)
            raise DataError(f"data {self.data}: {path}: folder {name!r} is none of `labels`; {known}")
        return self._labels.index(name)

    def _paths(self, split: str) -> list[str]:
        return [path for path in self._files if self._is_whole or path.split("/")[0] == split]

    def _parts(self, split: str) -> dict[int, list[str]]:
        """The paths of each chunk, in order."""
        paths = self._paths(split)
        parts = 1
        while len(paths) > parts * self.spec.chunk_rows:
            parts *= 2
        found: dict[int, list[str]] = {}
        for path in paths:
            found.setdefault(int(sha256(path.encode())[:12], 16) % parts, []).append(path)
        return dict(sorted(found.items()))

    def _chunk(self, rows: RowFormat, part: int, paths: Sequence[str]) -> Chunk:
        with ThreadPoolExecutor(READERS) as pool:
            named = list(pool.map(lambda path: [path, self._content_id(self._files[path])], paths))
        file_id = digest(named)
        return Chunk(
            id=digest([file_id, [READ_VERSION, rows.identity, list(self._labels), self.spec.max_unreadable]]),
            data=self.data,
            split=rows.split,
            url=self.spec.url or "",
            file_id=file_id,
            start=part,
            stop=part + 1,
            rows=len(paths),
            first_row=0,
            uid_base=None,
        )

    def _content_id(self, file: InputFile, content: bytes | None = None) -> str:
        if "://" in file.url and not file.url.startswith("file://"):
            return f"{file.size}-{file.etag}"
        return sha256(content if content is not None else _content(file))

    def _pieces(self, chunk: Chunk, rows: RowFormat) -> Iterator[Piece[Decoded]]:
        paths = self._parts(chunk.split).get(chunk.start, [])
        named: list[list[str]] = []
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(paths), PART_FILES):
                part = paths[start : start + PART_FILES]
                contents = list(pool.map(lambda path: _content(self._files[path]), part))
                named += [[p, self._content_id(self._files[p], c)] for p, c in zip(part, contents, strict=True)]
                yield self._piece(part, contents, start, rows)
        if digest(named) != chunk.file_id:
            raise DataError(f"data {self.data}: {chunk.url}: images have changed since the run was planned; run again")

    def _piece(
        self, paths: Sequence[str], contents: Sequence[bytes], first_row: int, rows: RowFormat
    ) -> Piece[Decoded]:
        assert isinstance(rows.features, Pictures)
        found = rows.features.decode_all(contents)
        kept = [path for path, usable in zip(paths, found.usable_N, strict=True) if usable]
        damage = tuple(
            Unreadable(1, first_row + row, f"{paths[row]}: {rows.features.decode_all([contents[row]]).reason}")
            for row in range(len(paths))
            if not found.usable_N[row]
        )
        uid_N, label_N = key_uids(pa.array(kept, pa.string())), pa.array(map(self._label, kept), pa.int64())
        return Piece(len(kept), Decoded(found.parts, uid_N, label_N.to_numpy()), 0, damage)

    def _format(self, split: str) -> RowFormat:
        features = Pictures("image", self.shape, self.options.resize)
        return RowFormat(features, "folder", None, self.classes, "path", None, split)


def _content(file: InputFile) -> bytes:
    with open_input(file.url) as stream:
        return stream.read()


SOURCE = ImageFolder
