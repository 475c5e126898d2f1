"""The story of a run, on one page: resolve → plan → train → measure → reduce → pack → ledger → manifest.

Layer 4. Every task stores its result create-only under a key that its input decides, so a run that was killed anywhere
goes on where it was, two drivers of one run do each other no harm, and the last write, the manifest, is the commit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.claims import Claims, write_claims
from pipeline.counted import counted, few
from pipeline.devices import memory_bytes
from pipeline.errors import DataError, StoreError, Unfinished
from pipeline.executor import Executor, Lost
from pipeline.job import Job, job_identity
from pipeline.kernels import choose
from pipeline.loading import forget
from pipeline.manifest import Coverage, Failed, Manifest, encode, manifest_key, read_manifest, versions
from pipeline.marks import await_looks
from pipeline.measuring.task import MeasureTask
from pipeline.pack import pack_tasks
from pipeline.plan import Plan, gone, make_plan, reduce_tasks, refuse_unfit, trained
from pipeline.progress import Progress, Silent
from pipeline.reduce import DONE, reduced_key, rows_key
from pipeline.resolve import Resolved, resolve
from pipeline.runlog import RunLog
from pipeline.stage import Stage, run_stage
from pipeline.store import MissingObject, Store
from pipeline.task import Task, run_task

# records of models are a few hundred bytes each, and a bucket takes 10 to 100 ms to give one
READERS = 16


@dataclass(frozen=True)
class Outcome:
    """What a run came to: `failed` maps the names of models that failed by themselves to the reason."""

    run: str
    new: bool
    trained: int
    cells: int
    reused_cells: int
    failed: dict[str, str]
    seconds: dict[str, float]
    loaded: int = 0

    @property
    def done(self) -> str:
        """What was done, in words."""
        loaded = f", {self.loaded} loaded" if self.loaded else ""
        trained, cells = counted(self.trained, "model"), counted(self.cells, "cell")
        return f"{trained} trained{loaded}, {cells} measured, {self.reused_cells} reused"


def run(job: Job, store: Store, executor: Executor, progress: Progress | None = None) -> Outcome:
    """Do what a job asks for and commit it once; CensusError where its input or the store does not allow it."""
    return carry_out(resolve(job, store), store, executor, progress)


def carry_out(resolved: Resolved, store: Store, executor: Executor, progress: Progress | None = None) -> Outcome:
    """Do what a resolved job asks for and commit it once; CensusError as for `run`."""
    show = progress or Silent()
    if is_committed(resolved, store):
        show.note(f"run {resolved.run} is already committed; where a later one measured the same, ask it by --run")
        return _committed(resolved, store)
    expect_fit(resolved, store)
    resolved.findings.release()
    # a process that has done another run may hold models whose checkpoints were made anew since
    forget()
    log = RunLog(resolved, executor.workers)
    log.begin(store)
    write_claims(store, resolved.run, _claims(resolved))
    if remark := choose.remark(resolved.kernel, resolved.device):
        show.note(remark)
    memory = partial(_memory_bytes, resolved.job, executor)
    plan = make_plan(resolved, store, workers=executor.workers, memory_bytes=memory)
    do = partial(_stage, store=store, executor=executor, progress=show, log=log)
    done = do("train", plan.train, total=plan.trainings)
    done = done.then(do("load", plan.load, total=plan.loads))
    measurable = _without(plan.measure, done)
    # cells of models that are not there are neither stored nor to do
    given_up = plan.missing_cells - sum(task.units for task in measurable)
    done = done.then(do("measure", measurable, total=plan.cells - given_up))
    stored = store.keys(f"runs/{resolved.run}/reduced/")
    done = done.then(do("reduce", reduce_tasks(resolved, stored, done.failed, open=done.open)))
    if done.open:
        log.write(store)
    _refuse_open(resolved, done)
    records = _records(resolved, store)
    done = done.then(
        do("pack", pack_tasks(resolved.run, {model: record["files"] for model, record in records.items()}))
    )
    log.write(store)
    _refuse_open(resolved, done)
    manifest = _manifest(resolved, records, done)
    _refuse_gone(resolved, store, manifest, show)
    store.put_once(manifest_key(resolved.run), encode(manifest))
    return _outcome(manifest, plan, done)


def is_committed(resolved: Resolved, store: Store) -> bool:
    """Whether everything is done already."""
    return manifest_key(resolved.run) in store.keys(f"runs/{resolved.run}/_manifest")


def expect_fit(resolved: Resolved, store: Store) -> None:
    """Refuse what cannot be done before anything is written: JobError of the plan, StoreError of the store."""
    refuse_unfit(resolved)
    store.probe()


def _memory_bytes(job: Job, executor: Executor) -> int | None:
    """What a worker has for models, as one of them tells."""
    for _, told in executor.map(memory_bytes, [job.allotted]):
        return None if isinstance(told, Lost) else told
    return None


def _claims(resolved: Resolved) -> Claims:
    checkpoints = {recipe.model_id(step) for _, recipe in trained(resolved) for step in recipe.checkpoints}
    checkpoints |= {model.id for model in resolved.models}
    cells = [
        (
            tuple(resolved.state_name(one) for one in resolved.statistics_of(split)),
            tuple(one.id for one in split.chunks),
        )
        for split in resolved.splits
    ]
    return Claims(tuple(sorted(checkpoints)), tuple(cells))


def _stage(
    name: str,
    tasks: Sequence[Task],
    *,
    store: Store,
    executor: Executor,
    progress: Progress,
    log: RunLog,
    total: int = 0,
) -> Stage:
    """Run the tasks of one stage; `total` counts what earlier runs have done as well."""
    work = sum(task.units for task in tasks)
    if max(total, work):
        progress.stage(name, max(total, work), max(total, work) - work)
    done = run_stage(partial(run_task, store=store), tasks, executor=executor, progress=progress)
    log.add(done)
    return done


def _without(tasks: Sequence[MeasureTask], done: Stage) -> list[MeasureTask]:
    left = [task.without(done.failed.keys() | done.open) for task in tasks]
    return [task for task in left if task.cells]


def _refuse_open(resolved: Resolved, done: Stage) -> None:
    """Raise what keeps a run open, after everything else is done: what a person must act on before what was lost."""
    if not done.open:
        return
    names = {model.id: model.name for model in resolved.models}
    models: dict[str, list[str]] = {}
    for model, reason in (done.unread or done.spoilt or done.lost).items():
        models.setdefault(reason, []).append(names.get(model, model))
    listed = [f"{few(sorted(those), 'model')}: {reason}" for reason, those in sorted(models.items())]
    lines = [f"run {resolved.run} is not finished; the rest of it is done:", *listed[:5]]
    more = [f"… and {counted(len(listed) - 5, 'more reason')}"] if len(listed) > 5 else []
    raise (DataError if done.unread else StoreError if done.spoilt else Unfinished)("\n".join(lines + more))


def _refuse_gone(resolved: Resolved, store: Store, manifest: Manifest, progress: Progress) -> None:
    """Raise Unfinished where something that the commit would name was removed while the run was at work.

    What a gc judged before the claims were written it may remove until it looks at them: see `marks.py` why nothing
    is removed behind the listing here.
    """
    await_looks(store, progress.note)
    sound = set(manifest.models) - {one.model for one in manifest.failed}
    tables = set(store.keys(f"runs/{resolved.run}/tables/"))
    lost = [f"file {file.key}" for file in manifest.files if file.key not in tables]
    lost += [f"cells or the checkpoint of {model.name}" for model in gone(resolved, store, sound)]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise Unfinished(
            f"run {resolved.run} is not finished: {', '.join(lost[:3])}{more}: removed while it was at work; "
            "the same command makes them again"
        )


def _records(resolved: Resolved, store: Store) -> dict[str, dict[str, Any]]:
    """What was reduced of each model, as its record says; Unfinished where that, or rows that it names, are gone."""
    keys = {model.id: reduced_key(resolved.run, model.id, DONE) for model in resolved.models}
    again = "the same command makes it again"
    try:
        with ThreadPoolExecutor(READERS) as pool:
            records = [json.loads(content) for content in pool.map(store.get, keys.values())]
    except MissingObject as error:
        raise Unfinished(f"run {resolved.run} is not finished: {error}; {again}") from error
    found = dict(zip(keys, records, strict=True))
    there = set(store.keys(f"runs/{resolved.run}/reduced/"))
    bare = {
        model: key
        for model, record in found.items()
        for table in record["files"]
        if (key := rows_key(resolved.run, model, table)) not in there
    }
    if bare:
        # a gc had it in hand when the run was taken up; the record would say for ever that the rows are there
        for model in bare:
            store.remove(keys[model])
        raise Unfinished(f"run {resolved.run} is not finished: {min(bare.values())} was removed; {again}")
    return found


def _manifest(resolved: Resolved, records: dict[str, dict[str, Any]], done: Stage) -> Manifest:
    """The commit: nothing in it differs between two drivers. StoreError if the ledger does not add up."""
    coverage: dict[str, Coverage] = {}
    for split in resolved.splits:
        name = f"{split.data}/{split.name}"
        seen = [Coverage(**record["coverage"][name]) for record in records.values() if name in record["coverage"]]
        if seen:
            coverage[name] = Coverage.agreed(name, seen, total=split.rows)
    names = {model.id: model.name for model in resolved.models}
    failures = [(model, record["failure"]) for model, record in sorted(records.items()) if record["failure"]]
    return Manifest(
        run=resolved.run,
        name=resolved.job.name,
        job=job_identity(resolved.job),
        models=tuple(sorted(records)),
        failed=tuple(Failed(model, names[model], reason) for model, reason in failures),
        coverage=coverage,
        versions=versions(),
        statistics={statistic.name: statistic.identity for statistic in resolved.statistics},
        files=tuple(sorted((one.file for one in done.receipts if one.file), key=lambda file: file.key)),
    )


def _outcome(manifest: Manifest, plan: Plan, done: Stage) -> Outcome:
    seconds: dict[str, float] = {}
    for receipt in done.receipts:
        seconds[receipt.kind] = seconds.get(receipt.kind, 0.0) + receipt.seconds
    return Outcome(
        run=manifest.run,
        new=True,
        trained=sum(receipt.units for receipt in done.receipts if receipt.kind == "train"),
        cells=sum(receipt.units for receipt in done.receipts if receipt.kind == "measure"),
        reused_cells=plan.cells - plan.missing_cells,
        failed={one.name: one.reason for one in manifest.failed},
        seconds=seconds,
        loaded=sum(receipt.units for receipt in done.receipts if receipt.kind == "load"),
    )


def _committed(resolved: Resolved, store: Store) -> Outcome:
    """The outcome of a run that is already committed: nothing was done."""
    manifest = read_manifest(store, resolved.run)
    failed = {one.name: one.reason for one in manifest.failed}
    return Outcome(resolved.run, False, 0, 0, resolved.cells, failed, {})
