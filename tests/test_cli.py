"""The command line: what it costs, how it guesses, what it prints and how it exits."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer.main
import typer.testing

import streamconv
from streamconv import __main__ as entry
from streamconv import errors
from streamconv.cli import progress
from streamconv.cli.commands import app, root
from streamconv.cli.default import with_command
from streamconv.ir.identity import job_identity
from streamconv.ir.planned import PlanHead, Totals
from streamconv.ir.planwriter import PlanWriter
from streamconv.options import JobOptions, Phase, Progress, Result, RunOptions

COMMANDS = root().commands
HEAVY = {"torch", "transformers", "numpy", "safetensors", "ml_dtypes", "rich"}


def run(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamconv", *args],
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def loaded_by(code: str) -> set[str]:
    """Return which heavy packages a fresh interpreter has loaded after ``code``."""
    code = f"import contextlib, io, sys\nwith contextlib.redirect_stdout(io.StringIO()):\n {code}\n"
    code += "print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("command", ["", *sorted(COMMANDS)])
def test_help_works_and_loads_nothing_heavy(command):
    done = run(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: streamconv" in done.stdout
    argv = [*command.split(), "--help"]
    assert not loaded_by(f"from streamconv.__main__ import _run; _run({argv!r})")


def test_version_works_and_loads_nothing_heavy():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"streamconv {streamconv.__version__}\n")
    assert not loaded_by("from streamconv.__main__ import _run; _run(['--version'])")


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_by("import streamconv; streamconv.convert, streamconv.JobOptions")


def test_no_module_has_the_name_of_a_public_function():
    """Importing such a module would put it in the function's place."""
    root = Path(streamconv.__file__).parent
    modules = {p.stem for p in root.iterdir()}
    assert not modules & set(streamconv.__all__)


def test_every_public_name_is_there():
    for name in streamconv.__all__:
        assert getattr(streamconv, name) is not None
    assert set(dir(streamconv)) == set(streamconv.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        streamconv.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("SRC DST", "convert SRC DST"),
        ("convert SRC DST", "convert SRC DST"),
        ("--max-mem 32GB SRC DST", "convert --max-mem 32GB SRC DST"),
        ("--max-mem=32GB SRC DST", "convert --max-mem=32GB SRC DST"),
        ("--json plan SRC", "plan --json SRC"),
        ("--max-mem 4GB plan SRC DST", "plan --max-mem 4GB SRC DST"),
        ("--model plan SRC DST", "convert --model plan SRC DST"),
        ("./plan DST", "convert ./plan DST"),
        ("-- plan DST", "convert -- plan DST"),
        ("-o PLAN plan SRC", "plan -o PLAN SRC"),
        ("SRC plan", "convert SRC plan"),
        ("--overwrite", "convert --overwrite"),
        ("--help", "--help"),
        ("--version", "--version"),
        ("plan --help", "plan --help"),
        ("", ""),
    ],
)
def test_no_command_means_convert(typed, meant):
    assert with_command(typed.split(), COMMANDS) == meant.split()


def test_a_missing_source_is_bad_input(tmp_path):
    done = run(str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert done.returncode == 5
    assert done.stderr.startswith("error: ")
    assert str(tmp_path / "nothing") in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ["SRC", "DST", "--max-mem", "lots"],
        ["SRC", "DST", "--max-shard-size", "80%"],
        ["SRC", "DST", "--dtype", "int3"],
        ["SRC", "DST", "--layout", "nice"],
        ["SRC", "DST", "--checksum", "md5"],
        ["SRC", "DST", "--io-threads", "0"],
        ["SRC", "DST", "--io-threads", "x"],
        ["SRC", "DST", "--nonsense"],
        ["SRC"],
    ],
)
def test_a_wrong_option_is_a_usage_error(args, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_json_too_where_json_was_asked_for(tmp_path):
    done = run("--json", str(tmp_path / "nothing"), str(tmp_path / "out"))
    told = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, told["event"], told["exit_code"]) == (5, "error", 5)
    assert told["kind"] == "bad-input"


@pytest.fixture
def failing(monkeypatch):
    """Make every conversion raise what is asked for."""

    def use(error: BaseException) -> None:
        def convert(*args, **kwargs):
            raise error

        monkeypatch.setattr("streamconv.api.convert", convert)

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield use
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(
    "error",
    [
        errors.StreamconvError("x"),
        errors.UsageError("x"),
        errors.BudgetError("x"),
        errors.BadInputError("x"),
        errors.UnsafeInputError("x"),
        errors.NoSpaceError("x"),
        errors.OutputExistsError("x"),
        errors.LockedError("x"),
    ],
    ids=lambda e: e.kind,
)
def test_each_error_exits_with_its_code(error, failing, capsys):
    failing(error)
    assert entry._run(["SRC", "DST"]) == error.exit_code
    assert capsys.readouterr().err == "error: x\n"


def test_an_unexpected_error_is_one_line_and_a_hint(failing, capsys):
    failing(RuntimeError("boom"))
    assert entry._run(["SRC", "DST"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: internal: RuntimeError: boom\n")
    assert "--debug" in err


def test_memory_that_the_system_refuses_is_no_fault_of_ours(failing, capsys):
    failing(MemoryError())
    assert entry._run(["SRC", "DST"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the system refused memory")
    assert "ulimit -v" in err


@pytest.mark.parametrize("given", ["pipe", "device", "weights", "edited"])
def test_what_is_no_plan_is_refused_at_once(given, tmp_path):
    plan = tmp_path / "plan"
    if given == "pipe":
        os.mkfifo(plan)
    elif given == "device":
        plan.symlink_to("/dev/zero")
    elif given == "weights":
        with plan.open("wb") as stream:
            stream.write(b"1")
            stream.truncate(1 << 40)  # one line of a terabyte
    else:
        nothing = Totals(0, 0, 0, 0, 0, {}, {})
        job = job_identity("fsdp", (), (), JobOptions()).to_json()
        head = PlanHead("/src", job, nothing, (), (), (), (), ())
        with plan.open("w", encoding="utf-8") as stream:
            writer = PlanWriter(stream)
            writer.head(head, ())
            writer.end()
        plan.write_text(plan.read_text().replace('"/src"', "7", 1))
    done = run("run", str(plan), str(tmp_path / "out"))
    assert done.returncode == 5, done.stderr


def test_debug_shows_the_traceback(failing):
    failing(RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        entry._run(["SRC", "DST", "--debug"])


def test_a_keyboard_interrupt_exits_with_130(failing):
    failing(KeyboardInterrupt())
    assert entry._run(["SRC", "DST"]) == 130


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_runs_the_cleanup_and_exits_with_its_number(signum, tmp_path):
    code = (
        "import sys, time, streamconv.api\n"
        "def convert(*a, **k):\n"
        "    try:\n"
        "        open(sys.argv[2], 'w').close(); time.sleep(60)\n"
        "    finally:\n"
        "        open(sys.argv[2] + '.clean', 'w').close()\n"
        "streamconv.api.convert = convert\n"
        "from streamconv.__main__ import main\n"
        "main()\n"
    )
    started = tmp_path / "started"
    process = subprocess.Popen([sys.executable, "-c", code, "SRC", str(started)])
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signum)
    assert process.wait(timeout=30) == 128 + signum
    assert Path(f"{started}.clean").exists()


def test_a_signal_ends_what_cannot_be_interrupted(tmp_path):
    """As when the main thread sits in an fsync for a minute: here it sleeps deaf to the signal."""
    code = (
        "import ctypes, signal, sys, streamconv.api\n"
        "def convert(*a, **k):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "    open(sys.argv[2], 'w').close(); ctypes.CDLL(None).sleep(60)\n"
        "streamconv.api.convert = convert\n"
        "from streamconv.__main__ import main\n"
        "main()\n"
    )
    started = tmp_path / "started"
    process = subprocess.Popen([sys.executable, "-c", code, "SRC", str(started)])
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143


def test_a_reader_that_has_gone_is_no_news(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "streamconv", "doctor"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_doctor_tells_versions_and_memory():
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["streamconv"] == streamconv.__version__
    assert found["versions"]["torch"]
    assert found["default_budget_bytes"] > 0
    assert (done.returncode, found["problems"]) == (0, [])


def test_doctor_says_why_a_source_cannot_be_read(tmp_path):
    done = run("doctor", str(tmp_path / "nothing"))
    assert done.returncode == 5
    assert "not readable here" in done.stdout


PROGRESS = Progress(
    done_bytes=1_000_000_000,
    reused_bytes=0,
    total_bytes=4_000_000_000,
    seconds=2.0,
    memory_bytes=200_000_000,
    budget_bytes=512_000_000,
    file="model.safetensors",
)


def test_plain_progress_comes_every_few_seconds_at_most():
    now, told = 0.0, []
    lines = progress.PlainLines(told.append, lambda: now)
    lines(Phase("write"))
    for now in (1.0, 4.9, 5.0, 6.0, 9.9, 10.1):  # noqa: B007 - the clock reads it
        lines(PROGRESS)
    line = "1.00 GB of 4.00 GB (25%), 500 MB/s, 6 s left, memory 200 MB / 512 MB"
    assert told == ["writing", line, line]


def test_json_progress_is_one_object_a_line(capsys):
    with progress.listen(json=True, quiet=False) as listener:
        listener(Phase("write"))
        listener(PROGRESS)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    when = [datetime.fromisoformat(event.pop("time")) for event in (first, second)]
    assert datetime.now(UTC) - when[0] < timedelta(minutes=1)
    assert first == {"event": "phase", "text": "write"}
    assert second == {"event": "progress", **asdict(PROGRESS)}


@pytest.mark.parametrize(
    ("width", "bar", "figures"),
    [
        (59, "━━━────────────", "  500 MB/s  6 s left  memory 200/512 MB"),
        (79, "━━━━━────────────────", "  1.00/4.00 GB  500 MB/s  6 s left  memory 200/512 MB"),
        (199, f"{'━' * 10}{'─' * 30}", "  1.00/4.00 GB  500 MB/s  6 s left  memory 200/512 MB"),
        (30, "", "  500 MB/s  6 s left"),
        (12, "", "  500 MB"),
    ],
)
def test_the_bar_fits_and_shows_what_matters_most_first(width, bar, figures):
    made = progress.bar_line(PROGRESS, width)
    assert made == " 25%" + (f" {bar}" if bar else "") + figures
    assert len(made) <= width


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_on_a_terminal_one_line_is_drawn_again_and_again(columns):
    """Seen as a terminal sees it: the line never wraps, notices stay above, nothing is left behind."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    code = (
        "import sys, time\n"
        "from streamconv.cli import progress\n"
        "from streamconv.options import *\n"
        f"at = {PROGRESS!r}\n"
        "with progress.listen(json=False, quiet=False) as on_event:\n"
        "    on_event(Phase('plan')); time.sleep(0.4); on_event(Notice('watch out'))\n"
        "    on_event(at); time.sleep(0.4)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=side)
    os.close(side)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: whoever wrote has ended
        while more := os.read(main, 1 << 16):
            seen += more
    os.close(main)
    assert child.wait(30) == 0
    text = seen.decode()
    drawn = [line.partition("\x1b[2K")[2] for line in re.split(r"[\r\n]+", text)]
    assert max(map(len, drawn)) < columns
    assert re.search(r"planning  \d s", text)
    assert "notice: watch out\r\n" in text
    assert " 25% " in text
    assert "500 MB/s  6 s left" in text
    assert text.endswith("\r\x1b[2K")


def test_quiet_says_nothing(capsys):
    with progress.listen(json=False, quiet=True) as listener:
        listener(Phase("write"))
    progress.summarize(Result("done", Path("out")), json=False, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_quiet_plans_and_verifies_tell_what_is_wrong_alone(checkpoints, tmp_path):
    """For scripts, which look at the exit code."""
    source, out, plan = checkpoints["fsdp2"].source, tmp_path / "out", tmp_path / "plan"
    runner = typer.testing.CliRunner()
    for command in (
        ["plan", str(source), "-q", "-o", str(plan)],
        ["run", str(plan), str(out), "-q", "--no-sync"],
        ["verify", str(out), "--quiet"],
    ):
        done = runner.invoke(app, command)
        assert (done.exit_code, done.output) == (0, "")
    (out / "config.json").write_text("{}")
    failed = runner.invoke(app, ["verify", str(out), "--quiet"])
    assert failed.exit_code == 5
    assert "config.json" in failed.output


@pytest.mark.usefixtures("planned_here")
def test_the_command_that_executes_a_plan_can_be_pasted(checkpoints, tmp_path):
    plan = tmp_path / "my plan"
    told = typer.testing.CliRunner().invoke(
        app, ["plan", str(checkpoints["fsdp2"].source), "-o", str(plan)]
    )
    assert f"`streamconv run '{plan}' DST`" in told.output


@pytest.mark.usefixtures("planned_here")
def test_a_config_folder_without_a_config_does_not_hide_the_checkpoints_own(checkpoints, tmp_path):
    (tmp_path / "wrong").mkdir()
    source = str(checkpoints["fsdp2"].source)
    told = typer.testing.CliRunner().invoke(
        app, ["plan", source, "--hf-config", str(tmp_path / "wrong")]
    )
    assert isinstance(told.exception, errors.UsageError)
    assert "--hf-config names has no config.json" in str(told.exception)
    assert "leave out --hf-config" in str(told.exception)


def test_the_summary_names_bytes_seconds_and_peak_against_budget():
    result = Result(
        "done",
        Path("out"),
        seconds=4.0,
        read_bytes=4_000_000_000,
        write_bytes=4_000_100_000,
        reused_bytes=1_000_000_000,
        peak_bytes=480_000_000,
        budget_bytes=512_000_000,
        files=7,
        tensors=290,
        unverifiable_bytes=1000,
        notices=("a notice",),
    )
    assert progress.render_result(result).splitlines() == [
        "notice: a notice",
        "unverifiable: 1.00 kB of the source carry no checksum",
        "done: out (290 tensors, 7 files, 4.00 GB)",
        "reused 1.00 GB of an earlier run",
        "read 4.00 GB in 4.0 s (1.00 GB/s); peak memory 480 MB of 512 MB",
    ]


def test_nothing_to_do_is_said():
    text = progress.render_result(Result("nothing-to-do", Path("out")))
    assert text == "nothing to do: out is already the complete output of this job"


def test_max_mem_may_be_a_share(monkeypatch):
    seen: list[RunOptions] = []

    def convert(src, dst, job, run):
        seen.append(run)
        return Result("done", dst)

    monkeypatch.setattr("streamconv.conversion.job.convert", convert)
    monkeypatch.setattr("streamconv.system.memory.available_bytes", lambda: (1000, "test"))
    streamconv.convert("SRC", "DST", max_mem="80%", checksum="sha256")
    assert (seen[0].max_mem_bytes, seen[0].sha256) == (800, True)
