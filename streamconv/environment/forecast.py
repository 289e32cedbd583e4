"""How long a conversion will take here, and what will hurt on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamconv.environment import speed, store_speed
from streamconv.environment.store_speed import StoreSpeed
from streamconv.executor.budget import remote_shares
from streamconv.files.filesystems import FileSystem, filesystem_of, why_not_writable
from streamconv.ir.planfile import Plan
from streamconv.storage.address import Address, place
from streamconv.system import memory
from streamconv.units import format_size

# Free space that is left over after the conversion: less is a disk that is as good as full.
_SPARE_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Forecast:
    """What moving a plan's bytes will take.

    Rates are bytes per second, None where they could not be measured. ``seconds`` is for moving
    (planning is done by then), None where there was nothing to measure it by. ``machines`` says what
    more of them would bring. Of a source in a store, ``store`` says how it is read, ``requests`` how
    many it takes.
    """

    seconds: float | None
    read_rate: float | None
    write_rate: float | None
    checksum_rate: float
    one_disk: bool
    source: FileSystem
    output: FileSystem
    machines: str
    warnings: tuple[str, ...]
    store: StoreSpeed | None = None
    requests: int | None = None


def forecast(plan: Plan, dst: Path, budget_bytes: int, *, measure_seconds: float = 1.0) -> Forecast:
    """Measure both disks for a moment and say how long ``plan`` will take into ``dst``."""
    root = place(plan.head.root)
    files = [root / f.path for f in sorted(plan.head.files, key=lambda f: -f.nbytes)]
    source, output = filesystem_of(root), filesystem_of(dst)
    totals = plan.head.totals
    found = requests = None
    if isinstance(root, Address):
        window, _, ahead = remote_shares(budget_bytes, totals)
        addresses = [file for file in files if isinstance(file, Address)]
        found = store_speed.read_speed(addresses, ahead, 2 * measure_seconds)
        requests = store_speed.requests_of(plan, ahead, window)
        read_rate = None if found is None else found.rate
    else:
        read_rate = speed.read_speed(files, measure_seconds)
    write_rate = (
        store_speed.write_speed(dst, measure_seconds)
        if isinstance(dst, Address)
        else speed.write_speed(dst, measure_seconds)
    )
    checksum_rate = speed.checksum_speed()
    one_disk = source.device == output.device >= 0 and not output.is_memory
    moving = moving_seconds(
        totals.read_bytes,
        totals.write_bytes,
        read_rate,
        write_rate,
        checksum_rate,
        one_disk=one_disk,
    )
    if moving is not None and found is not None and requests is not None:
        # However few bytes each of them brings.
        moving = max(moving, requests * found.latency_seconds / found.at_once)
    rates = [rate for rate in (read_rate, write_rate) if rate is not None]
    return Forecast(
        seconds=moving,
        read_rate=read_rate,
        write_rate=write_rate,
        checksum_rate=checksum_rate,
        one_disk=one_disk,
        source=source,
        output=output,
        machines=more_machines(
            source, output, len(plan.outputs()), bool(rates) and min(rates) > checksum_rate
        ),
        warnings=tuple(
            warnings(
                source,
                output,
                plan.disk_bytes(),
                budget_bytes,
                one_disk=one_disk,
                refused=why_not_writable(dst),
            )
        ),
        store=found,
        requests=requests,
    )


def moving_seconds(
    read_bytes: int,
    write_bytes: int,
    read_rate: float | None,
    write_rate: float | None,
    checksum_rate: float,
    *,
    one_disk: bool,
) -> float | None:
    """Return how long moving takes; None where a rate is not known.

    Reading and writing overlap where they are on two disks, and take turns on one; checksums
    overlap with both.
    """
    if read_rate is None or write_rate is None:
        return None
    reading, writing = read_bytes / read_rate, write_bytes / write_rate
    disks = reading + writing if one_disk else max(reading, writing)
    return max(disks, max(read_bytes, write_bytes) / checksum_rate)


def more_machines(source: FileSystem, output: FileSystem, files: int, by_processor: bool) -> str:
    """Return in words what more machines would bring to a conversion into so many ``files``.

    ``by_processor``: whether one machine's processor is slower than its way to the storage.
    """
    local = [
        what
        for what, system in (("the source", source), ("the output", output))
        if not system.is_network
    ]
    if local:
        are = "are" if len(local) > 1 else "is"
        return f"more of them bring nothing: {' and '.join(local)} {are} on this one's disk"
    if files == 1:
        return (
            "more of them bring nothing: there is one output file, and a part is at least one "
            "(--max-shard-size)"
        )
    least = f"up to {files} parts, a file each"
    if by_processor:
        return f"the processor is what takes longest here: n of them take about 1/n of it, {least}"
    return (
        "the network is what takes longest here: they help as far as the file server gives them more "
        f"than it gives one, {least}"
    )


def warnings(
    source: FileSystem,
    output: FileSystem,
    needed_bytes: int,
    budget_bytes: int,
    *,
    one_disk: bool,
    refused: str | None = None,
) -> list[str]:
    """Return what will hurt, as sentences; ``refused`` is why nothing can be written."""
    found = []
    if refused is not None:
        found.append(f"the output cannot be written: {refused}")
    if one_disk:
        found.append("source and output are on one file system: reading and writing take turns")
    for what, system in (("the source", source), ("the output", output)):
        if system.is_network:
            found.append(
                f"{what} is on {system.kind} ({system.source}): the network's speed and its other "
                "users decide"
            )
    if output.is_memory:
        found.append(
            f"the output is on {output.kind}: it takes {format_size(needed_bytes)} of memory, which "
            "the budget does not count"
        )
    left = output.free_bytes - needed_bytes
    if 0 <= left < _SPARE_SHARE * output.total_bytes:
        found.append(f"the output's file system will be almost full: {format_size(left)} left")
    state = memory.memory_state()
    if budget_bytes > state.available_bytes:
        then = "the machine would swap" if state.swap_bytes else "the kernel may kill it"
        found.append(
            f"the budget is {format_size(budget_bytes)} but only "
            f"{format_size(state.available_bytes)} of memory are available: {then}"
        )
    elif state.swap_used_bytes > state.swap_bytes // 2:
        found.append(f"the machine is swapping: {format_size(state.swap_used_bytes)} are in use")
    return found
