"""The Python API: keyword functions over the option classes. Nothing heavy is imported before a call.

Sizes may be given as people write them (``"32GB"``); ``max_mem`` may be a share of the memory that is
available (``"80%"``). Every function raises the errors of :mod:`streamconv.errors`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Unpack

from streamconv.errors import NoSpaceError, StreamconvError, UsageError, VerificationError
from streamconv.files import askedfile
from streamconv.files.inputs import local_path, reading
from streamconv.options import (
    AverageOptions,
    Cancel,
    ConvertKeywords,
    Event,
    JobKeywords,
    JobOptions,
    Notice,
    Phase,
    Result,
    RunOptions,
    ignore_event,
    job_options,
)
from streamconv.storage.address import Address, StrPath, place
from streamconv.storage.buckets import forget
from streamconv.units import format_size, parse_size

_LOG = logging.getLogger("streamconv")
_FEW_BYTES = 10_000  # of a budget: a unit was forgotten

if TYPE_CHECKING:
    from streamconv.conversion.lazy import LazyCheckpoint
    from streamconv.conversion.parts import Begun, Part
    from streamconv.ir.planfile import Plan
    from streamconv.verification.report import Report


def convert(
    src: StrPath,
    dst: StrPath,
    *,
    max_mem: int | str | None = None,
    overwrite: bool = False,
    sync: bool = True,
    direct: bool = False,
    source_crc: bool = True,
    checksum: str | None = None,
    io_threads: int = 1,
    cache: bool = True,
    on_event: Callable[[Event], None] = ignore_event,
    cancel: Cancel | None = None,
    report: StrPath | None = None,
    nodes: str | None = None,
    scattered: bool = False,
    **job: Unpack[JobKeywords],
) -> Result:
    """Convert the checkpoint ``src`` into the HuggingFace folder ``dst``.

    ``max_mem`` is the budget of the whole process tree (bytes, ``"32GB"``, ``"80%"``; None: what the
    machine can give). After an error ``dst`` is as it was; the same call again resumes, output file by
    output file. ``cache``: what transformers says of the model is remembered for the next time, when
    neither it nor torch is loaded. ``on_event`` hears how it goes, ``cancel`` ends it from another
    thread. ``report`` is an HTML file to write about it, ``job`` what decides the output: see
    :class:`JobKeywords`. ``nodes`` is a cluster that does it, ``"ray"`` or ``"ray://HOST"``, whose
    machines share both paths; ``max_mem`` is each worker's then (None: 1 GB). ``scattered``: they
    have each a part of ``src`` on disks of their own.
    """
    from streamconv.conversion.job import convert as run_job

    src, dst, report = _source(src, job), place(dst), _local(report)
    options = job_options(**job)
    run = run_options(
        max_mem, overwrite, sync, direct, source_crc, checksum, io_threads, on_event, cancel, cache
    )
    if nodes is not None:
        return _convert_on(nodes, src, dst, options, run, report, scattered)
    if scattered:
        raise UsageError("--scattered is for a cluster: --nodes ray")
    with _reading(src, job, dst):
        page = None if report is None else _own_file(report, askedfile.PAGE, src, dst, options)
        return _reported(page, lambda how: run_job(src, dst, options, how), run)


def _reported(page: Path | None, work: Callable[[RunOptions], Result], run: RunOptions) -> Result:
    """Do ``work`` with the options ``run``, and write a page about it where one was asked for."""
    if page is None:
        return work(run)
    from streamconv.report.conversion import convert_reported

    return convert_reported(page, work, run)


def _convert_on(
    nodes: str,
    src: Path,
    dst: Path,
    job: JobOptions,
    run: RunOptions,
    report: Path | None,
    scattered: bool,
) -> Result:
    from streamconv.nodes import ray_engine
    from streamconv.nodes.tasks import DEFAULT_BUDGET_BYTES, Request

    if report is not None:
        raise UsageError("--report is for a conversion on one machine, without --nodes")
    budget = run.max_mem_bytes or DEFAULT_BUDGET_BYTES
    sent = replace(run, max_mem_bytes=budget, on_event=ignore_event, cancel=None)
    request = Request(src.absolute(), dst.absolute(), job.absolute(), sent)
    return ray_engine.convert(nodes, request, run.on_event, scattered=scattered)


def average(
    sources: Sequence[StrPath],
    dst: StrPath,
    *,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    cancel: Cancel | None = None,
    **options: Unpack[ConvertKeywords],
) -> Result:
    """Convert the average of the checkpoints ``sources`` into the HuggingFace folder ``dst``.

    Each is read as :func:`convert` reads it: they may be of different formats, meshes and world sizes,
    but must make the same tensors. The terms are added up as they stand, in float64, divided once and
    rounded once. Without ``weights`` it is their mean; those are taken as they are, whatever they add
    up to. ``ema`` is the decay of a moving average that begins with the first source. ``options`` are
    those of :func:`convert`; config and tokenizer are those of the first source.
    """
    if not sources or isinstance(sources, str):
        raise UsageError("there is nothing to average", expected="a list of checkpoints")
    first, *others = map(_source_of_several, sources)
    if weights is not None and ema is not None:
        raise UsageError("an average has weights or a decay, and not both")
    if weights is not None:
        made = AverageOptions(tuple(others), tuple(map(float, weights)))
    elif ema is not None:
        made = AverageOptions.moving(others, ema)
    else:
        made = AverageOptions.mean(others)
    keywords = options.copy()
    keywords["average"] = made
    return convert(first, dst, cancel=cancel, **keywords)


def difference(
    one: StrPath,
    other: StrPath,
    dst: StrPath,
    *,
    cancel: Cancel | None = None,
    **options: Unpack[ConvertKeywords],
) -> Result:
    """Write ``one - other``, tensor by tensor, into the folder ``dst``: what training changed.

    It is of float32 where ``dtype`` does not say otherwise, exact for 16-bit weights. Both are read,
    and ``options`` are, as for :func:`average`.
    """
    keywords = options.copy()
    keywords.setdefault("dtype", "float32")
    return average([one, other], dst, weights=[1, -1], cancel=cancel, **keywords)


def _source_of_several(src: StrPath) -> Path:
    """Return where one of several checkpoints lies, written in the one way that leads nowhere else."""
    found = local_path(src).absolute()
    return found.resolve() if ".." in found.parts else found


def begin(
    src: StrPath,
    dst: StrPath,
    *,
    max_mem: int | str | None = None,
    overwrite: bool = False,
    sync: bool = True,
    source_crc: bool = True,
    checksum: str | None = None,
    on_event: Callable[[Event], None] = ignore_event,
    **job: Unpack[JobKeywords],
) -> Begun:
    """Begin the conversion of ``src``, a checkpoint or a plan of one, in parts.

    ``dst`` is a path that all who write parts share. ``job`` is for a checkpoint; a plan has it. What
    is begun already goes on; :func:`part` writes its files and :func:`finish` publishes them.
    """
    from streamconv.conversion.parts import begin as begin_parts

    src, dst = _source(src, job), place(dst)
    run = run_options(max_mem, overwrite, sync, False, source_crc, checksum, 1, on_event)
    with _reading(src, job, dst):
        return begin_parts(src, dst, job_options(**job), run)


def part(
    dst: StrPath,
    share: str | None = None,
    *,
    files: Collection[str] = (),
    max_mem: int | str | None = None,
    direct: bool = False,
    io_threads: int = 1,
    environment: Mapping[str, str] = MappingProxyType({}),
    on_event: Callable[[Event], None] = ignore_event,
) -> Part:
    """Write the part ``share`` (``"1/8"`` to ``"8/8"``) of what was begun in ``dst``, or its ``files``.

    Parts run in any order, at the same time and again; what is written already is passed over.
    ``"auto"`` takes the part from ``environment``, as ``--part auto`` does.
    """
    from streamconv.conversion.parts import Share, write_part

    if (share is None) == (not files):
        raise UsageError("a part is given by its share or by its files", expected="one of the two")
    which = files if share is None else Share.parse(share, environment)
    run = run_options(max_mem, False, True, direct, True, None, io_threads, on_event)
    with reading(dst):
        return write_part(place(dst), which, run)


def finish(
    dst: StrPath,
    *,
    max_mem: int | str | None = None,
    on_event: Callable[[Event], None] = ignore_event,
) -> Result:
    """Publish what was begun in ``dst``, once all of its files are written.

    Raises :class:`UnfinishedError` with the names of those that are not.
    """
    from streamconv.conversion.parts import finish as finish_parts

    run = run_options(max_mem, False, True, False, True, None, 1, on_event)
    with reading(dst):
        return finish_parts(place(dst), run)


def _reading(
    src: StrPath, job: JobKeywords, dst: StrPath | None = None
) -> AbstractContextManager[None]:
    return reading(src, *_beside(job), but=dst)


def _beside(job: JobKeywords) -> list[StrPath | None]:
    average = job.get("average")
    others = average.sources if average is not None else ()
    return [job.get("hf_config"), job.get("base"), *others]


def _source(src: StrPath, job: JobKeywords) -> Path:
    """Return where a checkpoint lies, a path or an address; what was learnt of stores is forgotten."""
    found = place(src)
    if isinstance(found, Address):
        forget()
        if job.get("average") is not None:
            raise UsageError(
                "a checkpoint in a store cannot be averaged with others",
                where=str(found),
                hint="copy it to a disk",
            )
        if job.get("base") is not None:
            raise UsageError(
                "an adapter in a store cannot be merged into a base model on a disk",
                where=str(found),
                found=str(job["base"]),
                hint="copy the adapter's checkpoint to a disk; it is small",
            )
    return found


def _local(path: StrPath | None) -> Path | None:
    return None if path is None else local_path(path)


def _own_file(
    path: Path, kind: askedfile.Kind, src: Path, dst: Path | None, job: JobOptions
) -> Path:
    """Return where a report or a plan will lie; raises before any work where it cannot."""
    from streamconv.files.filesystems import why_not_writable

    folders = [
        (src, "the checkpoint"),
        (dst, "the output folder"),
        (job.hf_config, "the folder with config and tokenizer"),
        (job.lora.base, "the base model"),
        *((p, "a checkpoint") for p in (job.average.sources if job.average is not None else ())),
    ]
    apart = [(folder, what) for folder, what in folders if folder is not None]
    place = askedfile.checked(path, kind, apart)
    reason = why_not_writable(place.parent)
    if reason is not None:
        raise StreamconvError(
            f"the {kind.word} cannot be written: {reason}",
            where=str(path),
            hint="choose another path",
        )
    return place


async def convert_async(src: StrPath, dst: StrPath, **options: Unpack[ConvertKeywords]) -> Result:
    """Convert as :func:`convert` does, in a thread, while other tasks go on.

    When the task is cancelled the conversion ends within a window's time, and what it has finished is
    kept for the next call. ``on_event`` is called in that thread.
    """
    import asyncio

    cancel = Cancel()
    work = asyncio.ensure_future(asyncio.to_thread(convert, src, dst, cancel=cancel, **options))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        cancel.set()
        with contextlib.suppress(StreamconvError):
            await work
        raise


def convert_all(
    src: StrPath, dst: StrPath, *, cancel: Cancel | None = None, **options: Unpack[ConvertKeywords]
) -> dict[str, Result]:
    """Convert every model of a training step (actor, critic) into a folder of its own below ``dst``.

    ``options`` are those of :func:`convert`; of a ``report`` each model gets its own, ``report.html``
    becoming ``report-actor.html`` and so on. Raises as :func:`convert` does; the models before the one
    that failed are finished then, and the same call again goes on with it.
    """
    from streamconv.formats import model_names

    src, dst, page = _source(src, {}), place(dst), _local(options.pop("report", None))
    with reading(src):
        names = model_names(src)
    if not names:
        raise UsageError(
            "there is one model here, or none", where=str(src), hint="leave out --model"
        )
    pages = {name: page and page.with_name(f"{page.stem}-{name}{page.suffix}") for name in names}
    for path in pages.values():  # before the first of the models is converted
        if path is not None:
            askedfile.checked(path, askedfile.PAGE)
    results = {}
    for name in names:
        each = options.copy()
        each["model"], each["report"] = name, pages[name]
        results[name] = convert(src, dst / name, cancel=cancel, **each)
    return results


def run(
    plan: StrPath,
    dst: StrPath,
    *,
    max_mem: int | str | None = None,
    overwrite: bool = False,
    sync: bool = True,
    direct: bool = False,
    source_crc: bool = True,
    checksum: str | None = None,
    io_threads: int = 1,
    on_event: Callable[[Event], None] = ignore_event,
    cancel: Cancel | None = None,
    report: StrPath | None = None,
) -> Result:
    """Execute the plan in the file ``plan`` into the folder ``dst``: torch is not loaded.

    The plan is what :func:`plan` wrote to its ``output``; the other options are those of
    :func:`convert`. Raises :class:`DamagedPlanError` for a file that is not a plan.
    """
    from streamconv.conversion.job import run_plan

    plan, dst, page = local_path(plan), place(dst), _local(report)
    how = run_options(
        max_mem, overwrite, sync, direct, source_crc, checksum, io_threads, on_event, cancel
    )
    with reading(plan, but=dst):
        if page is not None:
            page = _own_file(page, askedfile.PAGE, plan, dst, JobOptions())
        return _reported(page, lambda watched: run_plan(plan, dst, watched), how)


def upload(
    folder: StrPath,
    repo: str,
    *,
    private: bool = False,
    on_event: Callable[[Event], None] = ignore_event,
) -> str:
    """Upload an output folder to the HuggingFace Hub as the model ``repo``; return its address.

    Only a folder that :func:`verify` passes is uploaded. Older weights, indexes and adapters that lie
    there are deleted in the same commit, so that loaders find what was uploaded; ``on_event`` gets a
    notice that names them before. The Hub takes no file twice: the same call
    again goes on after an interruption. Raises :class:`VerificationError` for a folder that is not what
    its manifest says, :class:`UsageError` where there is no token.
    """
    from streamconv.conversion.hub import check_upload
    from streamconv.conversion.hub import upload as send

    folder = local_path(folder)
    check_upload(repo)
    report = verify(folder)
    if not report.passed:
        raise VerificationError(
            "the folder is not what its manifest says: nothing was uploaded",
            where=str(folder),
            found="; ".join(report.problems[:5]),
        )

    def name(old: list[str]) -> None:
        text = f"deletes older weights from {repo}, which its history keeps: {', '.join(old)}"
        on_event(Notice(text, tuple(old)))

    return send(folder, repo, private=private, before_delete=name)


def plan(
    src: StrPath,
    dst: StrPath | None = None,
    *,
    max_mem: int | str | None = None,
    output: StrPath | None = None,
    cache: bool = True,
    **job: Unpack[JobKeywords],
) -> Plan:
    """Return what :func:`convert` would do; no byte of a weight is read.

    The plan is written to ``output``, or to a temporary file that goes when the plan object does.
    ``cache`` is as for :func:`convert`. With ``dst``, raises :class:`NoSpaceError` where the output
    would not fit on its disk.
    """
    from streamconv.planning.child import make_plan

    src, output = _source(src, job), _local(output)
    dst = None if dst is None else place(dst)
    options = job_options(**job)
    budget = memory_bytes(max_mem)
    if output is not None:
        where = _own_file(output, askedfile.PLAN, src, dst, options)
        with _reading(src, job), askedfile.aside(where, askedfile.PLAN) as partial:
            made = make_plan(src, options, partial, max_mem_bytes=budget, cache=cache)
        made.path = where
    else:
        folder = tempfile.mkdtemp(prefix="streamconv-")
        path = Path(folder) / "plan.jsonl"
        try:
            with _reading(src, job):
                made = make_plan(src, options, path, max_mem_bytes=budget, cache=cache)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
    if dst is not None:
        check_disk(made, dst)
    return made


def open(  # noqa: A001 - meant to be called as streamconv.open
    src: StrPath, **job: Unpack[JobKeywords]
) -> LazyCheckpoint:
    """Return the checkpoint as a mapping of output names to lazy tensors.

    ``t[...]`` reads only what the slice needs, as numpy; ``t.torch(...)`` gives torch. Close the
    mapping, or use it in a ``with``.
    """
    from streamconv.conversion.lazy import open_checkpoint

    src, options = _source(src, job), job_options(**job)
    with _reading(src, job):
        return open_checkpoint(src, options)


def verify(
    folder: StrPath,
    *,
    source: StrPath | Sequence[StrPath] | None = None,
    reference: StrPath | None = None,
    base: StrPath | None = None,
    forward: bool = False,
    prompt: str | None = None,
    token_ids: Sequence[int] | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    logits_atol: float | None = None,
    hf_config: StrPath | None = None,
    max_mem: int | str | None = None,
    report: StrPath | None = None,
) -> Report:
    """Check an output folder; what is returned is true where nothing differs, and lists every problem.

    Against its manifest, unless only another model is asked about. ``source`` compares every tensor
    with the checkpoint, planned with the options of the manifest, but with the config in
    ``hf_config`` where that is given. Of an average it is a list of the checkpoints, in their order, or
    the first of them: the manifest says where the others lie. ``reference`` is another model folder,
    whose tensors may differ by ``atol + rtol * |reference|``. ``forward`` runs the model with
    transformers, on ``prompt`` or ``token_ids``; ``reference`` then is run, too, and the logits are
    compared and not the tensors (``logits_atol``; None: 1e-5 of the largest logit, 0.05 where dtypes
    differ). ``base`` is the model that an adapter's folder belongs to: its names are checked there, and
    it is run on it. ``report`` is an HTML file to write about it.
    """
    from streamconv.files.names import MANIFEST
    from streamconv.system.memory import available_bytes
    from streamconv.verification.folder import verify_output
    from streamconv.verification.forward import verify_forward
    from streamconv.verification.reference import verify_reference
    from streamconv.verification.report import Report
    from streamconv.verification.room import check_room
    from streamconv.verification.source import verify_source

    here = _source(folder, {})
    other = None if reference is None else _source(reference, {})
    given = [source] if isinstance(source, str | os.PathLike) else [*(source or ())]
    truth = [_source(path, {}) for path in given]
    model, config = _local(base), _local(hf_config)
    for where in (here, other) if forward else ():
        if isinstance(where, Address):
            raise UsageError(
                "--forward runs a model that lies on a disk: transformers reads no object stores",
                where=str(where),
                hint="copy the model to a disk, or leave out --forward",
            )
    _check_forward_options(forward, prompt, token_ids, logits_atol)
    _check_tolerances(atol, rtol, logits_atol)
    if (atol or rtol) and (reference is None or forward):
        raise UsageError(
            "--atol and --rtol are for tensors: they need --reference, and no --forward"
        )
    if logits_atol is not None and reference is None:
        raise UsageError("--logits-atol needs --reference")
    if hf_config is not None and not truth:
        raise UsageError("--hf-config needs --source")
    page = _local(report)
    if page is not None:
        page = _own_file(page, askedfile.PAGE, here, None, JobOptions())
    found = Report()
    budget = memory_bytes(max_mem)
    if model is not None and not (model / "config.json").is_file():
        raise UsageError("no config.json in the base model's folder", where=str(model))
    with reading(folder, *given, reference, hf_config, base):
        check_room([here, *([other] if other is not None else [])], budget or available_bytes()[0])
        foreign = forward and not (here / MANIFEST).is_file()
        if foreign and not truth:
            found.checked.append(
                f"note: no {MANIFEST} here, so the files themselves are not checked"
            )
        elif truth or other is None or forward:
            found.extend(verify_output(here, base=model))
        if truth and found.passed:
            src, *others = truth
            found.extend(
                verify_source(here, src, others=others, hf_config=config, max_mem_bytes=budget)
            )
        if other is not None and not forward:
            found.extend(verify_reference(here, other, atol=atol, rtol=rtol))
        if forward and found.passed:
            found.extend(
                verify_forward(
                    here,
                    reference=other,
                    base=model,
                    prompt=prompt,
                    token_ids=token_ids,
                    logits_atol=logits_atol,
                    max_mem_bytes=budget,
                )
            )
    if page is not None:
        from streamconv.report.verification import write_report

        write_report(page, here, found)
    return found


def diff(
    one: StrPath,
    other: StrPath,
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    max_mem: int | str | None = None,
) -> Report:
    """Compare two model folders tensor by tensor; what is returned is true where they agree.

    Tensors may differ by ``atol + rtol * |other|``. :func:`verify` with ``forward`` and ``reference``
    compares what the two answer.
    """
    return verify(one, reference=other, atol=atol, rtol=rtol, max_mem=max_mem)


def doctor(
    src: StrPath | None = None, dst: StrPath | None = None, *, model: str | None = None
) -> dict[str, Any]:
    """Return what this machine can do, and whether ``src`` can be read and ``dst`` written here.

    ``problems`` lists what would keep a conversion from working; it is empty where one works, and
    ``exit_code`` is what the conversion would end with. Sizes are in bytes.
    """
    from streamconv.environment.doctor import examine

    return examine(
        None if src is None else _source(src, {}), model, None if dst is None else place(dst)
    )


def _check_forward_options(
    forward: bool, prompt: str | None, token_ids: Sequence[int] | None, logits_atol: float | None
) -> None:
    if not forward and not (prompt is None and token_ids is None and logits_atol is None):
        raise UsageError("a prompt, token ids and a tolerance of logits need --forward")
    if prompt is not None and token_ids is not None:
        raise UsageError("both a prompt and token ids are given", hint="leave one of them out")


def _check_tolerances(*values: float | None) -> None:
    for value in values:
        if value is not None and not 0 <= value < math.inf:  # nor a NaN
            raise UsageError("a tolerance is a number from 0 on", found=str(value))


def inspect(src: StrPath, *, model: str | None = None) -> dict[str, Any]:
    """Return what is in the checkpoint as plain data: format, facts, files, tensors, notices."""
    from streamconv.planning.child import inspect_checkpoint

    src = _source(src, {})
    with reading(src):
        return inspect_checkpoint(src, model)


def run_options(
    max_mem: int | str | None,
    overwrite: bool,
    sync: bool,
    direct: bool,
    source_crc: bool,
    checksum: str | None,
    io_threads: int,
    on_event: Callable[[Event], None],
    cancel: Cancel | None = None,
    cache: bool = True,
) -> RunOptions:
    """Return the options that decide how it is run; raises :class:`UsageError`."""
    if checksum not in (None, "sha256"):
        raise UsageError(f"unknown checksum: {checksum!r}", expected="sha256")
    if io_threads < 1:
        raise UsageError(f"not a number of threads: {io_threads}", expected="1 or more")
    return RunOptions(
        max_mem_bytes=memory_bytes(max_mem),
        overwrite=overwrite,
        sync=sync,
        direct=direct,
        source_crc=source_crc,
        sha256=checksum == "sha256",
        io_threads=io_threads,
        cache=cache,
        on_event=_logged(on_event),
        cancel=cancel,
    )


def _logged(on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return a listener that also logs what it hears, under ``streamconv``."""

    def listener(event: Event) -> None:
        if isinstance(event, Notice):
            _LOG.info("notice: %s", event.text)
        elif isinstance(event, Phase):
            _LOG.info("phase: %s", event.name)
        else:
            _LOG.debug("%s of %s bytes, %s", event.done_bytes, event.total_bytes, event.file)
        on_event(event)

    return listener


def memory_bytes(max_mem: int | str | None) -> int | None:
    """Return a budget in bytes; a share is one of the memory that is available now."""
    if max_mem is None:
        return None
    if isinstance(max_mem, str) and max_mem.rstrip().endswith("%"):
        from streamconv.system.memory import available_bytes

        return parse_size(max_mem, whole_bytes=available_bytes()[0])
    nbytes = parse_size(max_mem)
    number = str(max_mem).strip()
    if number.isdecimal() and nbytes < _FEW_BYTES:
        raise UsageError(f"a budget of {nbytes} bytes", hint=f"did you mean --max-mem {number}GB?")
    return nbytes


def disk_free_bytes(dst: Path) -> int:
    """Return what is free on the disk that would hold ``dst``, which need not exist yet."""
    here = dst.absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def check_disk(plan: Plan, dst: Path) -> None:
    """Raise :class:`NoSpaceError` where the output of ``plan`` would not fit at ``dst``.

    A store is never full.
    """
    if isinstance(dst, Address):
        return
    needed, free = plan.disk_bytes(), disk_free_bytes(dst)
    if free < needed:
        raise NoSpaceError(
            "not enough disk space for the output",
            where=str(dst),
            expected=format_size(needed),
            found=f"{format_size(free)} free",
            hint="free some space, or choose a target on another disk",
        )
