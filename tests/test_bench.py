"""What the benchmarks do to the machine is undone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

_BODY = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from bench import measure
measure.psutil.virtual_memory = lambda: SimpleNamespace(available=1000)
measure._PAGE_ORDER = Path(sys.argv[1])
with measure.own_memory():
    print(measure._PAGE_ORDER.read_text(), flush=True)
    time.sleep(60)
"""


def test_page_reporting_is_put_back_when_a_benchmark_is_ended(tmp_path: Path) -> None:
    order = tmp_path / "order"
    order.write_text("9\n")
    with subprocess.Popen(
        [sys.executable, "-c", _BODY, order], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "11\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert order.read_text() == "9\n"
