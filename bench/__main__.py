"""All figures of RESULTS.md, one after the other: ``python -m bench [NAME …]``, as root for scale."""

from __future__ import annotations

import subprocess
import sys

_ALL = ("again", "speed", "latency", "planning", "peers", "scale")


def main() -> int:
    failed = []
    for name in sys.argv[1:] or _ALL:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"bench.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print("failed:", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
