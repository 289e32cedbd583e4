"""The planning child is fenced in: what it may take, and what its death means to the parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamconv.errors import BadInputError
from streamconv.planning import child


def test_metadata_that_never_ends_ends_the_child(tmp_path: Path) -> None:
    """As a dict key that is a tuple of tuples of … sixty deep, which is hashed for years."""
    bomb = tmp_path / "bomb"
    bomb.write_bytes(b"\x80\x04})" + b"2\x86" * 60 + b"Ns.")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from streamconv.planning import child\n"
        "from streamconv.torchfile.unpickle import load_inert\n"
        "child._PARSE_SECONDS = 0.1\n"
        "with child._limited_time(Path(sys.argv[1]).parent):\n"
        "    load_inert(Path(sys.argv[1]).read_bytes(), 'bomb')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, bomb], timeout=300, check=False)
    assert done.returncode == -signal.SIGXCPU


@pytest.mark.parametrize(
    ("signum", "told"), [("XCPU", "takes longer than any"), ("SEGV", "ended in a crash")]
)
def test_a_child_that_dies_is_bad_input(
    signum: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text(f"#!/bin/sh\nkill -{signum} $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(BadInputError, match=told) as caught:
        child.inspect_checkpoint(tmp_path)
    assert caught.value.found == f"SIG{signum}"
