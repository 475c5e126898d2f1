"""SHA-256 of many model files, each read once for as long as it does not change.

Layer 2. A model's id needs every byte of it, and a job is resolved more than once. What was hashed is stored beside
size and ETag (on a disk: inode and time of change); a file that was written only just before is not trusted with that,
for it may change again within the same tick of its clock. Whoever reads a model hashes what it reads anyway.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import StoreError
from pipeline.foreign.files import ModelFiles, digests_of
from pipeline.hashing import digest
from pipeline.inputs import InputFile
from pipeline.store import MissingObject, Store

READERS = 8
# coarser clocks of file systems tick every two seconds
SETTLED_S = 2.0


def known_digests(models: Sequence[ModelFiles], location: str, store: Store) -> list[dict[str, str]]:
    """The SHA-256 of each model's files by name; reads the files that are new or changed since the last time."""
    prefix = f"data/digests/{digest(location)}/"
    keys = store.modified(prefix)
    before = _read(store, max(keys, key=lambda key: (keys[key], key))) if keys else {}
    started_s = time.time()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda model: _known(model, before) or digests_of(model), models))
    _remember(models, found, before, keys, prefix, started_s=started_s, store=store)
    return found


def _remember(
    models: Sequence[ModelFiles],
    found: Sequence[Mapping[str, str]],
    before: Mapping[str, Any],
    keys: Mapping[str, Any],
    prefix: str,
    *,
    started_s: float,
    store: Store,
) -> None:
    files = [(file, digests[name]) for model, digests in zip(models, found, strict=True) for name, file in model.files]
    now = {
        file.url: [file.size, file.etag, sha256]
        for file, sha256 in files
        if _sha256(file, before) or file.modified_s is None or file.modified_s < started_s - SETTLED_S
    }
    if now == before:
        return
    content = json.dumps(now, sort_keys=True).encode()
    kept = f"{prefix}{digest(now)}.json"
    store.put_once(kept, content)
    for key in keys:
        if key != kept:
            store.remove(key)


def _known(model: ModelFiles, before: Mapping[str, Any]) -> dict[str, str] | None:
    known = {name: _sha256(file, before) for name, file in model.files}
    return {name: value for name, value in known.items() if value} if all(known.values()) else None


def _sha256(file: InputFile, before: Mapping[str, Any]) -> str | None:
    size, etag, sha256 = before.get(file.url, (None, None, None))
    return sha256 if (size, etag) == (file.size, file.etag) else None


def _read(store: Store, key: str) -> dict[str, Any]:
    try:
        return dict(json.loads(store.get(key)))
    except MissingObject:  # another driver has replaced it
        return {}
    except ValueError as error:
        raise StoreError(f"{key} is damaged ({error}); remove it and run again") from error
