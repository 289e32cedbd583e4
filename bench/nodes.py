"""What more machines would bring to one large conversion: an estimate from rates that were measured.

    python -m bench.nodes [--gigabytes 1340] [--file-gigabytes 5] [--nodes 1 8 64 512]

A machine works on one file at a time for each of its processes and takes the next when it has
finished one, as Ray's tasks do; storage is shared by whoever moves bytes. Planning and finishing are
done by one machine. What the storage gives is assumed, and said in each row; the rates of a process are
those of bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import heapq
import math
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Storage:
    """Bytes per second: what one process can move, reading and writing at once, and what all get."""

    name: str
    process: float
    machine: float
    everybody: float


# A process: one core copies, sums and hashes at 1 GB/s (bench/RESULTS.md). S3 within 64 MB: 40 MB/s a
# connection, 16 of them, 30 ms a request; the rest is what such storage is sold with.
STORAGES = (
    Storage("S3, 64 MB a process", 0.25 * GB, 3.1 * GB, math.inf),
    Storage("S3, 1 GB a process, 25 Gbit/s a machine", 1.0 * GB, 3.1 * GB, math.inf),
    Storage("parallel file system, 100 GB/s", 1.0 * GB, 12.0 * GB, 100 * GB),
    Storage("file server, 2 GB/s for everybody", 1.0 * GB, 3.1 * GB, 2 * GB),
)


def seconds(
    storage: Storage, nodes: int, files: int, file_bytes: float, *, processes: int = 1
) -> float:
    """Return the time of moving ``files``: each at the slowest of three rates, all at the storage's."""
    workers = nodes * processes
    busy = min(workers, files)
    rate = min(storage.process, storage.machine / processes, storage.everybody / busy)
    free = [0.0] * workers
    for _ in range(files):
        heapq.heappush(free, heapq.heappop(free) + file_bytes / rate)
    # The last files have the storage to themselves: it is never slower than all of it at once.
    alone = file_bytes / min(storage.process, storage.machine / processes)
    return max(min(max(free), files * file_bytes / (rate * busy) + alone), alone)


def table(total_bytes: float, file_bytes: float, nodes: list[int], fixed_seconds: float) -> str:
    """Return minutes by storage and number of machines, and what each number is bound by."""
    files = math.ceil(total_bytes / file_bytes)
    head = "| storage (assumed) | " + " | ".join(f"{n} machines" for n in nodes) + " |"
    rows = [head, "|---|" + "---|" * len(nodes)]
    for storage in STORAGES:
        cells = []
        for n in nodes:
            moving = seconds(storage, n, files, file_bytes)
            least = total_bytes / storage.everybody
            bound = (
                "planning, finishing"
                if fixed_seconds > moving
                else "storage"
                if least > 0.9 * moving
                else "files"
                if n >= files
                else "process"
            )
            cells.append(f"{(moving + fixed_seconds) / 60:.1f} ({bound})")
        rows.append(f"| {storage.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1340, help="of the output")
    parser.add_argument("--file-gigabytes", type=float, default=5)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--fixed-seconds", type=float, default=120, help="planning and finishing")
    given = parser.parse_args()
    print(f"minutes (est.) for {given.gigabytes:g} GB in files of {given.file_gigabytes:g} GB")
    print(table(given.gigabytes * GB, given.file_gigabytes * GB, given.nodes, given.fixed_seconds))


if __name__ == "__main__":
    main()
