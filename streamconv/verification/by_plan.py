"""An output folder against a plan: every byte of it is what the converter would write.

This is the converter's own byte path, which writes nothing here and compares; neither torch nor the
manifest takes part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from streamconv.errors import BadInputError, UnsafeInputError
from streamconv.executor import budget as budgets
from streamconv.executor.pipeline import WindowFiller, filled_windows
from streamconv.executor.records import RecordChecks
from streamconv.executor.remote import open_source
from streamconv.formats.safetensors_file import FileTensor, read_folder
from streamconv.ir.planfile import Plan
from streamconv.ir.planned import PlannedTensor
from streamconv.storage.address import Address, place
from streamconv.verification.beside import file_problems
from streamconv.verification.room import check_room

_STEP_BYTES = 1 << 20


def plan_problems(folder: Path, plan: Plan, budget: int, *, source_crc: bool = True) -> list[str]:
    """Return in what a folder differs from what ``plan`` would write; the source is read for it.

    Raises :class:`BadInputError` for a source that is damaged, :class:`BudgetError` where what the
    folder says of itself does not fit ``budget``.
    """
    check_room([folder], budget)
    try:
        held = read_folder(folder, nested=True)
    except (BadInputError, UnsafeInputError) as error:
        return [f"{error.where}: {error.what} ({error.found})"]
    wrong = dict(wrong_headers(plan, held))
    names = [t.name for t in planned_tensors(plan)]
    problems = [f"{n}: {what}" for n, what in wrong.items()]
    problems += [f"{n}: not in the source" for n in sorted(held.keys() - {*names})]
    problems += [f"{n}: {what}" for n, what in file_problems(folder, plan)]
    if problems:
        return problems  # named without a look at the weights
    bad, _ = differing_tensors(plan, held, names, budget, source_crc=source_crc)
    return [f"{n}: differs from the source" for n in sorted(bad)]


def planned_tensors(plan: Plan) -> Iterator[PlannedTensor]:
    """Yield all tensors of a plan, those that are not written among them."""
    for _, section in plan.sections():
        yield from section


def wrong_headers(plan: Plan, held: Mapping[str, FileTensor]) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong) for tensors that are missing, or of another type or shape."""
    for t in planned_tensors(plan):
        found = held.get(t.same_as or t.name)
        if found is None:
            yield t.name, "in the source, not here"
        elif (found.dtype, found.shape) != (t.dtype, t.shape):
            yield (
                t.name,
                f"{found.dtype} {list(found.shape)}, the source gives {t.dtype} {list(t.shape)}",
            )


def differing_tensors(
    plan: Plan,
    held: Mapping[str, FileTensor],
    names: Collection[str],
    budget: int,
    *,
    source_crc: bool = True,
) -> tuple[set[str], int]:
    """Compare ``names`` with what the converter would write.

    Returns those that differ, and the source bytes without a checksum. Every source record that
    takes part is checked against its CRC-32.
    """
    if not names:
        return set(), 0
    bad: set[str] = set()
    with ExitStack() as stack:
        reader = stack.enter_context(open_source(place(plan.head.root), plan.head.files))
        checks = RecordChecks(reader, check_crc=source_crc)
        ahead = None
        if isinstance(place(plan.head.root), Address):
            max_window, factors, ahead = budgets.remote_shares(budget, plan.head.totals)
        else:
            max_window, factors = budgets.shares(budget, plan.head.totals)
        filler = WindowFiller(
            reader, checks, max_bytes=max_window, factor_bytes=factors, ahead=ahead
        )
        stack.callback(filler.close)
        streams: dict[Path, IO[bytes]] = {}
        last = {s.fqn: t.name for t in planned_tensors(plan) if t.name in names for s in t.sources}
        for window, buffer in filled_windows(_chosen(plan, names, last), filler, checks):
            for s in window.segments:
                target = held[s.tensor.same_as or s.tensor.name]
                if target.path not in streams:
                    streams[target.path] = stack.enter_context(target.path.open("rb"))
                stream = streams[target.path]
                stream.seek(target.begin + s.lo * target.dtype.itemsize)
                for at in range(0, s.nbytes, _STEP_BYTES):
                    n = min(_STEP_BYTES, s.nbytes - at)
                    if stream.read(n) != buffer[s.at + at : s.at + at + n]:
                        bad.add(s.tensor.name)
        reader.check_unchanged()
    return bad, checks.unverifiable_bytes


def _chosen(plan: Plan, names: Collection[str], last: Mapping[str, str]) -> Iterable[PlannedTensor]:
    for t in planned_tensors(plan):
        if t.name in names:
            final = tuple(k for k, s in enumerate(t.sources) if last[s.fqn] == t.name)
            yield dataclasses.replace(t, last=final)
