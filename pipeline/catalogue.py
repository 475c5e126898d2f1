"""The catalogue: what questions over many runs need to know first, in a few objects instead of thousands.

Layer 1. It holds the manifests of the runs that were committed when it was written and, of every part of their tables,
the footer and the Bloom filters that say whose rows it has. It is a shortcut and nothing else: named after its own
bytes, written create-only, the object that names the others last. Which runs are committed is asked of the store, by a
small listing of each; a run that it lacks is read from its manifest, and a part that it lacks as if there were no
catalogue, so that writers of any number and age hide nothing, and a commit that was withdrawn is not shown.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError
from pipeline.hashing import sha256
from pipeline.manifest import (
    READERS,
    Committed,
    File,
    Manifest,
    commits_among,
    committed_runs,
    from_json,
    in_order,
    read_manifests,
)
from pipeline.published import FIRST_READ_BYTES, PROTOCOL, Piece, PublishedFiles
from pipeline.store import MissingObject, Store

FORMAT = 1
FOLDER = "catalogue/"
RUNS = f"{FOLDER}runs-"
# one page for a table: the footers of its parts differ little, and are compressed together
PAGE_BYTES = 1 << 30

# (key, SHA-256) of a part: what was known of a part that has been committed anew is never used
Part = tuple[str, str]


@dataclass(frozen=True)
class Catalogue:
    """The runs of one catalogue, oldest first, and for each table the object with what is known of its parts."""

    store: Store
    runs: tuple[Committed, ...]
    objects: Mapping[str, str]
    _read: dict[str, dict[Part, list[Piece]]] = field(default_factory=dict)

    def pieces(self, file: File) -> Sequence[Piece]:
        """What is known of a part; the first question about a table reads its object."""
        return self._of_table(file.table).get((file.key, file.sha256), ())

    def load(self) -> None:
        """Read what is known of every table; StoreError if it is damaged."""
        for table in self.objects:
            self._of_table(table)

    def _of_table(self, table: str) -> dict[Part, list[Piece]]:
        if table not in self._read:
            self._read[table] = _pieces(self.store, self.objects.get(table))
        return self._read[table]


def read_catalogue(store: Store) -> Catalogue | None:
    """The newest catalogue; None if there is none that this program can read, StoreError if it is damaged."""
    found = store.modified(RUNS)
    for key in sorted(found, key=lambda key: (found[key], key), reverse=True):
        # one that has just been replaced
        with suppress(MissingObject):
            return _decode(store, key, _checked(store, key))
    return None


def published_runs(store: Store, catalogue: Catalogue | None) -> list[Committed]:
    """Every run that is committed now, oldest first: from the catalogue, or what it lacks from its manifest."""
    if catalogue is None:
        return committed_runs(store)
    there = commits_among(store, store.folders("runs/"))
    known = [one for one in catalogue.runs if there.get(one.manifest.run) == one.when]
    others = there.keys() - {one.manifest.run for one in known}
    return in_order([*known, *read_manifests(store, {run: there[run] for run in others})])


def write_catalogue(store: Store) -> Catalogue:
    """Write down what is committed now and remove what earlier catalogues held; the same runs give the same bytes."""
    runs = tuple(committed_runs(store))
    known = _known_so_far(store)
    tables = sorted({file.table for manifest, _ in runs for file in manifest.files})
    parts = {table: [file for manifest, _ in runs for file in manifest.files_of(table)] for table in tables}
    contents = {table: _encoded(files, _looked_up(store, files, known)) for table, files in parts.items()}
    objects = {table: f"{FOLDER}{table}-{sha256(content)[:32]}.parquet" for table, content in contents.items()}
    for table, content in contents.items():
        store.put_once(objects[table], content)
    content = _encode(runs, objects)
    key = f"{RUNS}{sha256(content)[:32]}.json.gz"
    store.put_once(key, content)
    for old in set(store.keys(FOLDER)) - {key, *objects.values()}:
        store.remove(old)
    return Catalogue(store, runs, objects)


def _known_so_far(store: Store) -> Callable[[File], Sequence[Piece]]:
    try:
        last = read_catalogue(store)
        if last is not None:
            last.load()
    except StoreError:
        return lambda _: ()  # it is damaged, and about to be replaced
    return last.pieces if last is not None else lambda _: ()


def _looked_up(
    store: Store, files: Sequence[File], known: Callable[[File], Sequence[Piece]]
) -> Iterator[Sequence[Piece]]:
    published = PublishedFiles(store, {file.key: file.bytes for file in files})
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda file: known(file) or _edges(published, file), files)


def _edges(published: PublishedFiles, file: File) -> list[Piece]:
    """The footer of a part and the Bloom filters of its row groups."""
    try:
        opened = published.open(f"{PROTOCOL}://{file.key}")
        end = _at(opened, max(0, file.bytes - FIRST_READ_BYTES), file.bytes)
        footer_bytes = int.from_bytes(end.content[-8:-4], "little") + 8
        if footer_bytes > len(end.content):
            end = _at(opened, max(0, file.bytes - footer_bytes), file.bytes)
        filters = _filters(pq.read_metadata(pa.BufferReader(end.content)))
        return [end, *(_at(opened, start, stop) for start, stop in filters if start < end.start)]
    except (OSError, pa.ArrowException) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise StoreError(f"{file.key} {what}; run `neuron-census verify`") from error


def _at(opened: Any, start: int, stop: int) -> Piece:
    opened.seek(start)
    return Piece(start, opened.read(stop - start))


def _filters(metadata: pq.FileMetaData) -> Iterator[tuple[int, int]]:
    """Where the Bloom filters of a part are."""
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.bloom_filter_offset is not None:
                yield column.bloom_filter_offset, column.bloom_filter_offset + column.bloom_filter_length


def _encoded(files: Sequence[File], pieces: Iterator[Sequence[Piece]]) -> bytes:
    rows = [(file, piece) for file, those in zip(files, pieces, strict=True) for piece in those]
    table = pa.table(
        {
            "key": pa.array([file.key for file, _ in rows], pa.string()),
            "sha256": pa.array([file.sha256 for file, _ in rows], pa.string()),
            "start": pa.array([piece.start for _, piece in rows], pa.int64()),
            "content": pa.array([piece.content for _, piece in rows], pa.large_binary()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=9,
        use_dictionary=["key", "sha256"],
        write_statistics=False,
        data_page_size=PAGE_BYTES,
    )
    return sink.getvalue()


def _pieces(store: Store, key: str | None) -> dict[Part, list[Piece]]:
    if key is None:
        return {}
    try:
        content = _checked(store, key)
    except MissingObject:
        return {}  # a newer catalogue has replaced it
    # read ahead by pyarrow's own threads can abort a process that ends soon after
    table = pq.ParquetFile(io.BytesIO(content), pre_buffer=False).read(use_threads=False)
    found: dict[Part, list[Piece]] = {}
    for row in zip(*(table[name].to_pylist() for name in ("key", "sha256", "start", "content")), strict=True):
        found.setdefault((row[0], row[1]), []).append(Piece(row[2], row[3]))
    return found


def _encode(runs: Sequence[Committed], objects: Mapping[str, str]) -> bytes:
    listed = [{"committed": when.isoformat(), "manifest": asdict(manifest)} for manifest, when in runs]
    text = json.dumps({"format": FORMAT, "objects": objects, "runs": listed}, sort_keys=True)
    return gzip.compress(text.encode(), mtime=0)


def _decode(store: Store, key: str, content: bytes) -> Catalogue | None:
    value = json.loads(gzip.decompress(content))
    if value["format"] > FORMAT:
        return None
    runs = [_committed(one, key) for one in value["runs"]]
    return Catalogue(store, tuple(runs), value["objects"])


def _committed(value: Mapping[str, Any], key: str) -> Committed:
    manifest: Manifest = from_json(value["manifest"], key=key)
    return Committed(manifest, datetime.fromisoformat(value["committed"]))


def _checked(store: Store, key: str) -> bytes:
    content = store.get(key)
    if sha256(content)[:32] != key.rsplit("-", 1)[1].split(".", 1)[0]:
        raise StoreError(f"{key} is damaged; `neuron-census catalogue` writes it anew")
    return content
