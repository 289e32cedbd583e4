"""What the command line says to a newcomer: help, slips, questions, stops, logs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import streamconv
from streamconv import api, errors
from streamconv.batch.state import Record, Store
from streamconv.cli.batch_report import LiveView, print_status
from streamconv.cli.commands import root
from streamconv.errors import OutputExistsError
from streamconv.options import JobOptions, differing_flags
from tests.test_cli import run

COMMANDS = sorted(root().commands)


def test_help_opens_with_the_main_command_and_its_budget():
    text = run("--help").stdout
    assert text.startswith("Usage: streamconv SRC DST [--max-mem 32GB]")
    assert text.index("--max-mem SIZE") < text.index("Commands:") < text.index("batch")
    assert "..." not in text.partition("Commands:")[2], "summaries are whole"


def test_no_command_shows_the_list_and_is_wrong_usage():
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: streamconv SRC DST")
    done = run("verl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: streamconv verl")


def test_help_for_a_command_is_its_help():
    assert run("help", "verl", "merge").stdout == run("verl", "merge", "--help").stdout
    assert run("help").stdout == run("--help").stdout
    assert run("-V").stdout == run("--version").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_what_is_about_the_command_itself(name):
    text = run(name, "--help").stdout
    if name not in ("verl", "help"):
        for flag in ("--verbose", "--log-file", "--debug"):
            assert flag in text


def test_the_options_that_most_use_stand_first_and_examples_last():
    text = run("convert", "--help").stdout
    order = [
        text.index(word)
        for word in ("--max-mem", "--lora MODE", "--no-sync", "--json", "Examples:")
    ]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("typed", "likely"),
    [
        (["conver", "a", "b"], "streamconv convert"),
        (["stats", "out"], "streamconv status"),
        (["merge", "a"], "streamconv verl merge"),
        (["convert", "a", "b", "--max-men", "3GB"], "--max-mem"),
        (["a", "b", "--dtpe", "bf16"], "--dtype"),
        (["help", "pln"], "plan"),
    ],
)
def test_a_slip_gets_the_likely_word(typed, likely, tmp_path):
    done = run(*typed, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert likely in done.stderr


def test_a_checkpoint_may_be_called_nearly_as_a_command(tmp_path):
    (tmp_path / "plans").mkdir()
    done = run("plans", "out", cwd=tmp_path)
    assert done.returncode == 5
    assert "command" not in done.stderr


def test_a_wrong_option_is_an_event_for_programs_too():
    done = run("plan", "--json", "--nonsense")
    assert json.loads(done.stdout)["exit_code"] == 2


def test_the_budget_may_come_from_the_environment(tmp_path):
    (tmp_path / "src").mkdir()
    environment = {**os.environ, "STREAMCONV_MAX_MEM": "lots"}
    done = run("src", "out", cwd=tmp_path, env=environment)
    assert done.returncode in (2, 5)
    done = run("plan", "src", cwd=tmp_path, env={**environment, "STREAMCONV_MAX_MEM": "1MB"})
    assert done.returncode == 4


def test_completion_knows_options_where_no_command_is_named():
    environment = {
        **os.environ,
        "_STREAMCONV_COMPLETE": "complete_bash",
        "COMP_WORDS": "streamconv SRC DST --max-m",
        "COMP_CWORD": "3",
    }
    assert run(env=environment).stdout.split() == ["--max-mem"]
    environment |= {"COMP_WORDS": "streamconv ba", "COMP_CWORD": "1"}
    assert run(env=environment).stdout.split() == ["batch"]
    for words, values in (
        ("SRC DST --dtype b", ["bfloat16"]),
        ("SRC DST --lora ", ["auto", "merge", "adapter", "both"]),
        ("plan SRC --quantize fp8-c", ["fp8-channel"]),
    ):
        environment |= {"COMP_WORDS": f"streamconv {words}", "COMP_CWORD": "4"}
        assert run(env=environment).stdout.split() == values


def test_dashes_for_stdout_are_refused(tmp_path):
    (tmp_path / "src").mkdir()
    done = run("src", "-", cwd=tmp_path)
    assert done.returncode == 2
    assert "folder" in done.stderr


def test_the_log_file_has_what_was_printed_and_replaces_nothing(checkpoints, tmp_path):
    source = checkpoints["fsdp2"].source
    log = tmp_path / "run.log"
    for _ in range(2):
        done = run(str(source), str(tmp_path / "out"), "--log-file", str(log))
        assert done.returncode == 0, done.stderr
    text = log.read_text()
    assert text.startswith("# streamconv log\n")
    assert text.count("# streamconv log") == 1
    assert "phase: plan" in text
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO ", text, re.MULTILINE)
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    done = run("inspect", str(source), "--log-file", str(mine))
    assert (done.returncode, mine.read_text()) == (8, "mine")
    done = run("inspect", str(source), "--log-file", str(tmp_path / "gone" / "run.log"))
    assert done.returncode == 2
    assert "the log cannot be written: No such file or directory" in done.stderr


def test_verbose_says_more(checkpoints, tmp_path):
    done = run(str(checkpoints["fsdp2"].source), str(tmp_path / "out"), "-v")
    assert "INFO phase: write" in done.stderr


def test_another_jobs_output_says_which_option_differs(checkpoints, tmp_path):
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    streamconv.convert(source, out, sync=False)
    with pytest.raises(OutputExistsError, match="--dtype keep, now --dtype bfloat16") as caught:
        api.convert(source, out, dtype="bf16")
    assert "--max-shard-size" not in str(caught.value)
    with pytest.raises(OutputExistsError) as caught:
        streamconv.convert(source, out, dtype="bf16")
    (note,) = caught.value.__notes__
    assert "made with dtype='keep', now dtype='bfloat16'" in note
    assert "overwrite=True" in note


def test_which_flags_differ_is_said_as_they_are_typed():
    before = JobOptions(strict=True, keep_dtype=("*.gate.*",)).to_json()
    now = JobOptions(max_shard_bytes=10**9).to_json()
    assert differing_flags(before, now) == [
        "--keep-dtype *.gate.*, now no --keep-dtype",
        "--max-shard-size 5.00 GB, now --max-shard-size 1.00 GB",
        "--strict, now no --strict",
    ]
    assert differing_flags(now, now) == []


def test_errors_speak_the_language_of_the_caller():
    text = errors.in_python(
        "choose --model actor|critic, `--lora adapter` or --no-sync; --config K=V"
    )
    assert (
        text == ("choose model='actor|critic', `lora='adapter'` or sync=False; config K=V")
        or "model='actor|critic'" in text
    )
    assert "--" not in text


def test_a_signal_says_what_is_kept(checkpoints, tmp_path):
    """Stopped in the middle: the staging folder stays, and the same command goes on."""
    source, out = checkpoints["fsdp2"].source, tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "import streamconv.executor.writer as writer\n"
        "from streamconv import __main__ as entry\n"
        "import streamconv.conversion.execution as execution\n"
        "before = execution.write_output\n"
        "def stopping(*a, **k):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return before(*a, **k)\n"
        "execution.write_output = stopping\n"
        f"sys.exit(entry._run([{str(source)!r}, {str(out)!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 128 + signal.SIGINT
    assert "the same command goes on" in done.stderr
    assert not out.exists()
    assert run(str(source), str(out)).returncode == 0


def test_a_dry_batch_writes_nothing(checkpoints, tmp_path):
    source = checkpoints["fsdp2"].source
    real = tmp_path / "real" / "global_step_20" / "actor"
    real.mkdir(parents=True)
    for path in source.rglob("*"):
        if path.is_file():
            target = real / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            os.utime(target, (time.time() - 7200,) * 2)
    for folder in (real, *real.parents[:2]):
        os.utime(folder, (time.time() - 7200,) * 2)
    (tmp_path / "real" / "latest_checkpointed_iteration.txt").write_text("20")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    done = run("batch", str(tmp_path / "real"), str(tmp_path / "out"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert f"would convert {real}" in done.stdout
    assert "1 to convert" in done.stdout
    found = json.loads(
        run("batch", str(tmp_path / "real"), str(tmp_path / "out"), "--dry-run", "--json").stdout
    )
    assert [t["source"] for t in found["convert"]] == [str(real)]


def test_doctor_shows_the_whole_table_and_a_verdict_whatever_the_source(tmp_path):
    missing = tmp_path / "nothing"
    told, inspected = run("doctor", str(missing)), run("inspect", str(missing))
    assert told.returncode == inspected.returncode == 5
    assert "transformers" in told.stdout
    assert "verdict: not ready, 1 problem" in told.stdout
    assert inspected.stderr.strip() in told.stdout


def test_facts_are_words_and_a_summary_leaves_out_the_tensors(checkpoints):
    source = str(checkpoints["fsdp2"].source)
    whole, summary = run("inspect", source).stdout, run("inspect", source, "--summary").stdout
    assert len(summary) < len(whole)
    facts = summary.partition("\nskipped:")[0]
    assert not re.search(r'[\[{"]', facts)
    assert " × " in whole


def test_a_diff_is_where_people_look_for_it(checkpoints, tmp_path):
    source = str(checkpoints["fsdp2"].source)
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert run(source, one, "--no-sync").returncode == 0
    assert run(source, other, "--no-sync", "--dtype", "fp16").returncode == 0
    page = tmp_path / "page.html"
    assert run("diff", one, one).returncode == 0
    done = run("diff", one, other, "--report", str(page))
    assert done.returncode == 5
    assert "Tensors that differ" in page.read_text() or "Problems" in page.read_text()


def test_a_plan_that_is_run_gets_a_page(checkpoints, tmp_path):
    plan, out, page = (str(tmp_path / n) for n in ("plan.jsonl", "out", "page.html"))
    assert run("plan", str(checkpoints["fsdp2"].source), "-o", plan).returncode == 0
    assert run("run", plan, out, "--report", page).returncode == 0
    assert "Memory" in Path(page).read_text()


def _two_step_run(checkpoints, root: Path) -> Path:
    for step in (10, 20):
        shutil.copytree(checkpoints["fsdp2"].source, root / f"global_step_{step}" / "actor")
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    return root


def test_a_batch_tells_times_losses_and_idle_rounds_in_a_line(checkpoints, tmp_path):
    root, out = _two_step_run(checkpoints, tmp_path / "run"), tmp_path / "out"
    # An output is in the way of the second step, whose source then goes: lost.
    (out / "global_step_20" / "actor").mkdir(parents=True)
    (out / "global_step_20" / "actor" / "mine.txt").write_text("mine")
    done = run("batch", str(root), str(out), "--no-sync")
    assert done.returncode == 3
    assert re.search(r"^\d\d:\d\d:\d\d global_step_10/actor: done", done.stderr, re.MULTILINE)
    shutil.rmtree(root / "global_step_20")
    told = tmp_path / "told"
    done = run("batch", str(root), str(out), "--on-error", f"echo $STREAMCONV_STATE > {told}")
    assert done.returncode == 3
    assert "error: global_step_20/actor: lost: the source went away" in done.stderr
    assert told.read_text() == "gone\n"
    done = run("batch", str(root), str(out))
    assert (done.returncode, done.stdout) == (0, "1 done before\n")


def test_a_step_that_came_and_went_unseen_is_told(checkpoints, tmp_path):
    """Steps 10, 20 and 30 are remembered; now there is 50, and 40 was there for a while."""
    root, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(checkpoints["fsdp2"].source, root / "global_step_50" / "actor")
    (root / "latest_checkpointed_iteration.txt").write_text("50")
    store = Store(out)
    store.begin()
    for step in (10, 20, 30):
        name = f"global_step_{step}/actor"
        known = Record(name, str(out / name), run="run", step=step, root=str(root))
        known.state = "done"
        store.save(known)
    notices = streamconv.convert_run(root, out, dry_run=True).notices
    assert any("step 40 came and went between two rounds" in text for text in notices)


def test_status_shows_the_latest_and_groups_reasons(tmp_path, capsys):
    records = [Record(f"step_{n}", f"/out/step_{n}") for n in range(30)]
    for record in records:
        record.state, record.reason = "failed", "the disk is full"
    print_status(records, 20)
    text = capsys.readouterr().out
    assert "step_9 " not in text
    assert "and 10 before them (--last 0 shows all)" in text
    assert "step_0, step_1, step_2 and 27 more: the disk is full" in text
    assert text.count("the disk is full") == 1


def test_the_live_line_says_what_runs_in_any_width():
    view = LiveView(32 * 10**9)
    assert view.text(80) == ""
    record = Record("step_1", "/out/step_1", done_bytes=10**9, total_bytes=4 * 10**9)
    for key in "ab":
        view.hear("queued", SimpleNamespace(key=key, record=record))
    view.hear("started", SimpleNamespace(key="a", record=record))
    view.hear("progress", SimpleNamespace(key="a", record=record))
    view._began = time.monotonic() - 100
    line = view.text(200)
    assert "0 of 2 done  1 running (1.00 GB of 4.00 GB)" in line
    assert "10.0 MB/s" in line
    assert "11:40 min left" in line  # 7 of 8 GB: what waits is as large
    assert line.endswith(" of 32.0 GB")
    assert all(len(view.text(width)) <= width for width in (10, 40, 60, 80, 200))
    record.write_bytes = 4 * 10**9
    view.hear("done", SimpleNamespace(key="a", record=record))
    assert view.text(80) == ""
    view.hear("started", SimpleNamespace(key="b", record=Record("step_2", "/out/step_2")))
    assert "1 of 2 done  1 running, planning" in view.text(200)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[run]\nroot = "a"\noutput = "b"', "[[run]], in two brackets"),
        ('[[run]]\nroot = "a"\noutput = "b"\nevery = "x"', "run 1: every: expected a whole number"),
        ('[[run]]\nroot = "a"\noutput = "b"\npin = "x"', "run 1: pin: expected true or false"),
        ("jobs = 2", "run is missing"),
    ],
)
def test_errors_of_a_job_file_are_in_our_words(text, says, tmp_path):
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(text)
    done = run("batch", str(jobs))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Input should" not in done.stderr
