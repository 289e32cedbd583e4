"""The pure parts of batch: schedules, selection, names, readiness, the ledger, retention, settings."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from streamconv.batch import metrics, relay
from streamconv.batch.discover import Candidate, candidate_at, checkpoint_inside, discover
from streamconv.batch.ledger import EachItsOwn, Ledger
from streamconv.batch.ready import Snapshot, Tracker, judge, look_at, read_tracker, snapshot
from streamconv.batch.retention import Rule
from streamconv.batch.schedule import Cron, Every, local_now, parse_schedule
from streamconv.batch.selection import Filter, named, namer, parse_steps
from streamconv.batch.settings import BatchSettings, RunSettings, load, settings
from streamconv.batch.state import Record
from streamconv.cli.commands import app
from streamconv.errors import BadInputError, BudgetError, UsageError
from streamconv.options import JobOptions, LoraOptions, RunOptions
from streamconv.units import format_duration, parse_duration

RANKS = "model_world_size_1_rank_0.pt"


def candidate(relative: str, run: str = "run") -> Candidate:
    """A checkpoint at ROOT/relative, with the step that its path names."""
    parts = Path(relative).parts
    step = next(p for p in parts if p.startswith("global_step_"))
    root = Path("/root-of-runs")
    at = parts.index(step)
    return Candidate(
        path=root / relative,
        relative=Path(relative),
        run="/".join(parts[:at]) or run,
        step=int(step.rsplit("_", 1)[1]),
        step_dir=root.joinpath(*parts[: at + 1]),
        model="/".join(parts[at + 1 :]),
        format="fsdp",
    )


# Times


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1h30m", 5400)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "10 minutes", "-5m", "5m3"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError):
        parse_duration(text)


def test_durations_are_said_as_people_do():
    assert [format_duration(s) for s in (8, 65, 3700)] == ["8 s", "1:05 min", "1:01 h"]


@pytest.mark.parametrize(
    ("cron", "now", "following"),
    [
        ("*/10 * * * *", "2026-03-01 12:00:30", "2026-03-01 12:10"),
        ("*/10 * * * *", "2026-03-01 12:59:59", "2026-03-01 13:00"),
        ("30 4 * * *", "2026-03-01 04:30:00", "2026-03-02 04:30"),
        ("0 0 1 1 *", "2026-03-01 00:00:00", "2027-01-01 00:00"),
        ("0 0 29 2 *", "2026-03-01 00:00:00", "2028-02-29 00:00"),
        ("0 12 * * mon-fri", "2026-03-06 13:00:00", "2026-03-09 12:00"),  # a Friday
        ("0 12 * * 7", "2026-03-06 13:00:00", "2026-03-08 12:00"),
        ("0 0 13 * 5", "2026-03-01 00:00:00", "2026-03-06 00:00"),  # the 13th or a Friday
        ("5,35 9-17/4 * jun *", "2026-03-01 00:00:00", "2026-06-01 09:05"),
        ("@daily", "2026-12-31 23:59:00", "2027-01-01 00:00"),
    ],
)
def test_cron(cron, now, following):
    schedule = parse_schedule(cron)
    assert isinstance(schedule, Cron)
    assert schedule.next_after(datetime.fromisoformat(now)) == datetime.fromisoformat(following)


@given(
    st.datetimes(datetime.fromisoformat("2020-01-01"), datetime.fromisoformat("2030-01-01")),
    st.sampled_from(["*/7 * * * *", "0 3 * * 1", "15 */6 1,15 * *"]),
)
def test_the_next_time_is_later_and_the_first(now, cron):
    schedule = parse_schedule(cron)
    following = schedule.next_after(now)
    assert following > now
    assert schedule.next_after(now.replace(second=0, microsecond=0)) == following
    assert schedule.next_after(following) > following


@pytest.fixture
def berlin(monkeypatch):
    """Clocks go forward on 29 March 2026 at 2:00, and back on 25 October at 3:00."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("when", "begin", "rounds"),
    [
        # A fixed time that is skipped comes a moment late, one that comes twice is met once.
        ("30 2 * * *", "2026-03-28T22:00Z", ["03-29 01:00", "03-30 00:30"]),
        ("30 2 * * *", "2026-10-24T22:00Z", ["10-25 00:30", "10-26 01:30"]),
        ("30 2 * * *", "2026-10-25T01:10Z", ["10-26 01:30", "10-27 01:30"]),
        ("0 4 * * *", "2026-03-28T12:00Z", ["03-29 02:00", "03-30 02:00"]),
        ("0 4 * * *", "2026-10-24T12:00Z", ["10-25 03:00", "10-26 03:00"]),
        # What is tied to no hour follows the time that passes.
        ("*/30 * * * *", "2026-03-29T00:20Z", ["03-29 00:30", "03-29 01:00", "03-29 01:30"]),
        ("*/30 * * * *", "2026-10-25T00:20Z", ["10-25 00:30", "10-25 01:00", "10-25 01:30"]),
        ("@hourly", "2026-10-24T23:30Z", ["10-25 00:00", "10-25 01:00", "10-25 02:00"]),
        ("90m", "2026-10-24T23:30Z", ["10-25 01:00", "10-25 02:30"]),
        ("1d", "2026-03-28T12:00Z", ["03-29 12:00"]),
    ],
)
def test_rounds_when_clocks_are_changed(berlin, when, begin, rounds):
    schedule, at, seen = parse_schedule(when), datetime.fromisoformat(begin), []
    for _ in rounds:
        local = at.astimezone(local_now().tzinfo)
        at = schedule.next_after(local).astimezone(UTC)
        seen.append(f"{at:%m-%d %H:%M}")
    assert seen == rounds


@pytest.mark.parametrize("text", ["99999999d", "9" * 400 + "d", "36501d"])
def test_a_time_that_no_calendar_holds_is_refused(text):
    for parse in (parse_duration, parse_schedule):
        with pytest.raises(UsageError, match="too long"):
            parse(text)
    assert parse_schedule("36500d").next_after(local_now()).year > 2100


def test_a_duration_is_a_schedule_too():
    assert parse_schedule("10m") == Every(600)


@pytest.mark.parametrize(
    "text", ["soon", "0s", "* * *", "60 * * * *", "*/0 * * * *", "5-1 * * * *", "x * * * *"]
)
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(UsageError):
        parse_schedule(text)


def test_a_day_that_never_comes_is_refused():
    with pytest.raises(UsageError, match="never"):
        parse_schedule("0 0 31 2 *").next_after(datetime.fromisoformat("2026-01-01"))


# Discovery


def tree(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def found(root: Path, **kwargs) -> list[tuple[str, str, int | None, str]]:
    return [(c.relative.as_posix(), c.run, c.step, c.model) for c in discover(root, **kwargs)]


def test_a_run_of_verl(tmp_path):
    run = tmp_path / "qwen"
    tree(
        run,
        f"global_step_20/critic/{RANKS}",
        f"global_step_20/actor/{RANKS}",
        f"global_step_100/actor/{RANKS}",
        f"global_step_100/actor/huggingface/{RANKS}",  # inside a checkpoint: not one
        "global_step_30/data.pt",  # hollow: rotation has been here
        f".hidden/global_step_5/{RANKS}",
    )
    assert found(run) == [
        ("global_step_20/actor", "qwen", 20, "actor"),
        ("global_step_20/critic", "qwen", 20, "critic"),
        ("global_step_100/actor", "qwen", 100, "actor"),
    ]


def test_runs_below_one_root_and_steps_without_a_model_folder(tmp_path):
    tree(tmp_path, f"a/x/global_step_1/{RANKS}", f"b/checkpoint-7/{RANKS}", f"plain/{RANKS}")
    assert found(tmp_path) == [
        ("a/x/global_step_1", "a/x", 1, ""),
        ("b/checkpoint-7", "b", 7, ""),
        ("plain", tmp_path.name, None, ""),
    ]


def test_a_step_given_as_the_root(tmp_path):
    step = tmp_path / "global_step_9"
    tree(step, f"actor/{RANKS}")
    assert found(step) == [("actor", "global_step_9", 9, "actor")]
    assert found(step / "actor") == [(".", "actor", None, "")]


def test_outputs_and_links_are_not_looked_into(tmp_path):
    tree(tmp_path, f"global_step_1/{RANKS}", f"out/global_step_1/{RANKS}")
    (tmp_path / "latest").symlink_to("global_step_1")
    assert [f[0] for f in found(tmp_path, avoid=[tmp_path / "out"])] == ["global_step_1"]


def noticed(root: Path, **kwargs) -> list[str]:
    told: list[str] = []
    discover(root, on_notice=told.append, **kwargs)
    return [text.partition(":")[0].removeprefix(f"{root}/") for text in told]


def test_steps_that_only_a_link_leads_to_are_named(tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    tree(run, f"global_step_1/{RANKS}", f".kept/global_step_3/{RANKS}")
    tree(disk, f"global_step_2/actor/{RANKS}")
    links = {"latest": "global_step_1", "global_step_2": disk / "global_step_2"}
    links |= {"global_step_3": ".kept/global_step_3", "up": "..", "nowhere": "gone", "loop": "loop"}
    for name, target in links.items():
        (run / name).symlink_to(target)
    assert noticed(run) == ["global_step_2", "global_step_3"]
    assert [c.step for c in discover(run)] == [1]


def test_deep_steps_are_found(tmp_path):
    tree(tmp_path, f"a/b/c/d/e/f/g/global_step_1/actor/{RANKS}")
    assert [f[1:] for f in found(tmp_path)] == [("a/b/c/d/e/f/g", 1, "actor")]


def test_checkpoints_that_are_left_out_are_named(tmp_path):
    """In another one, and below what is or was an output folder."""
    tree(tmp_path, f"global_step_1/{RANKS}", f"global_step_1/critic/{RANKS}")
    tree(tmp_path, f"out/global_step_2/{RANKS}", "old/.streamconv-batch/jobs/x", "old/x/notes")
    tree(tmp_path, f"old/global_step_3/actor/{RANKS}")
    assert [f[0] for f in found(tmp_path, avoid=[tmp_path / "out"])] == ["global_step_1"]
    left_out = ["global_step_1/critic", "old/global_step_3/actor", "out/global_step_2"]
    assert sorted(noticed(tmp_path, avoid=[tmp_path / "out"])) == left_out


def test_what_is_a_checkpoints_own_is_no_other(tmp_path):
    """Megatron's weights lie in a folder below, and so does its optimizer."""
    for step, place in ((1, "dist_ckpt"), (2, "model/dist_ckpt"), (3, ".")):
        actor = tmp_path / f"global_step_{step}/actor"
        for folder in (place, "optimizer/dist_ckpt", "extra"):
            tree(actor / folder, ".metadata", "__0_0.distcp", "common.pt")
            (actor / folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert [f[0] for f in found(tmp_path)] == [f"global_step_{n}/actor" for n in (1, 2, 3)]
    assert noticed(tmp_path) == []
    for step in (1, 2, 3):
        actor = tmp_path / f"global_step_{step}/actor"
        assert checkpoint_inside(actor) is None
        tree(actor, f"critic/{RANKS}")
        assert checkpoint_inside(actor) == actor / "critic"
    assert noticed(tmp_path) == [f"global_step_{n}/actor/critic" for n in (1, 2, 3)]


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path):
    tree(tmp_path, f"global_step_1/{RANKS}")
    (tmp_path / "global_step_2").mkdir()
    os.mkfifo(tmp_path / "global_step_2" / RANKS)  # no regular file: the format refuses it
    problems = []
    assert [c.step for c in discover(tmp_path, on_problem=problems.append)] == [1]
    assert [str(tmp_path / "global_step_2") in str(p) for p in problems] == [True]


def test_a_root_that_is_not_there(tmp_path):
    with pytest.raises(BadInputError, match="no such folder"):
        discover(tmp_path / "nowhere")


# Selection and names

STEPS = [
    candidate(f"global_step_{n}/{m}") for n in (50, 100, 150, 200) for m in ("actor", "critic")
]


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        (Filter(), [50, 100, 150, 200]),
        (Filter(every=100), [100, 200]),
        (Filter(last=2), [150, 200]),
        (Filter(steps=parse_steps("100:150")), [100, 150]),
        (Filter(steps=parse_steps(":50,200:")), [50, 200]),
        (Filter(every=100, last=1), [200]),
    ],
)
def test_filters_of_steps(chosen, steps):
    both = [c for c in STEPS if c.step in steps]
    assert chosen.choose(STEPS) == both
    only = dataclasses.replace(chosen, model="actor")
    assert only.choose(STEPS) == [c for c in both if c.model == "actor"]


def test_a_model_that_no_folder_is_called_after_lies_within(tmp_path):
    bare = [candidate("plain/global_step_1"), candidate("hf/global_step_1/pytorch_model_fsdp_0")]
    run = RunSettings(root=tmp_path, output=tmp_path / "out", model="actor")
    assert run.filter.choose([*bare, *STEPS]) == [c for c in STEPS if c.model == "actor"]
    others = [dataclasses.replace(c, model="critic") for c in STEPS]  # two in each step
    assert run.filter.choose([*bare, *others]) == bare
    assert [run.job_options(c).model for c in (*bare, STEPS[0])] == ["actor", "actor", None]


def test_the_last_ones_are_counted_by_run_and_model():
    mixed = [
        candidate("a/global_step_1"),
        candidate("a/global_step_2"),
        candidate("b/global_step_1"),
    ]
    assert Filter(last=1).choose(mixed) == mixed[1:]


@pytest.mark.parametrize("text", ["", "a", ":", "1-5", "5:x", "900:100"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(UsageError):
        parse_steps(text)


@pytest.mark.parametrize(
    ("template", "model", "name"),
    [
        (None, None, "a/global_step_100/actor"),
        (None, "actor", "a/global_step_100"),
        ("{run}/{step}", None, "a/100"),
        ("{model}-{step:06d}-{format}", None, "actor-000100-fsdp"),
        ("{step_dir}", None, "global_step_100"),
    ],
)
def test_names_of_outputs(template, model, name):
    assert namer(template, model)(candidate("a/global_step_100/actor")) == name


@pytest.mark.parametrize(
    "template",
    ["{stepp}", "{step.__class__}", "{0}", "{", "{run!r:x}}", "{run:d}", "{step:%Q}"],
)
def test_templates_that_will_not_do(template):
    with pytest.raises(UsageError):
        namer(template, None)


@pytest.mark.parametrize("template", ["/abs/{step}", "../{step}", ".{step}", ""])
def test_names_that_lead_astray(template):
    with pytest.raises(UsageError, match="cannot be used"):
        namer(template, None)(candidate("a/global_step_100/actor"))


def test_a_step_that_is_none_fits_no_format_of_numbers():
    numbered = candidate("global_step_7/actor")
    assert namer("{step:06d}", None)(numbered) == "000007"
    with pytest.raises(UsageError, match="not a template"):
        namer("{step:06d}", None)(replace(numbered, step=None))


def test_two_checkpoints_of_one_name_are_refused():
    several = [candidate("global_step_1/actor"), candidate("global_step_1/critic")]
    assert list(named(several, namer("{step}/{model}", None))) == ["1/actor", "1/critic"]
    with pytest.raises(UsageError, match="one output: 1\n"):
        named(several, namer("{step}", None))


def test_an_output_inside_another_is_refused():
    several = [candidate("global_step_1/actor"), candidate("global_step_1")]
    with pytest.raises(UsageError, match="one output: 1\n"):
        named(several, lambda c: f"1/{c.model}" if c.model else "1")


# Readiness

NOW = 10**18
SECOND = 10**9


def verdict(*, age: float, still: float = 0.0, tracker: Tracker | None = None, whole: bool = True):
    def check() -> None:
        if not whole:
            raise BadInputError("rank 3 has no directory")

    return judge(
        candidate("global_step_100/actor"),
        Snapshot("digest", NOW - int(age * SECOND), 10),
        tracker,
        settle_seconds=300,
        still_seconds=still,
        now_ns=NOW,
        check_whole=check,
    )


@pytest.mark.parametrize("age", [-1000, 0, 301, 3000])
def test_a_checkpoint_is_ready_once_we_saw_it_lie_still(age):
    """Clocks may differ by minutes: what seems to be old was perhaps written this moment."""
    assert not verdict(age=age, still=299).ready
    assert verdict(age=age, still=301).ready


def test_what_is_older_than_any_clock_would_make_it_is_ready_at_once():
    assert verdict(age=3600 + 301).ready
    assert not verdict(age=3600 + 299).ready


def test_the_tracker_makes_it_ready_at_once():
    assert verdict(age=5, tracker=Tracker(100, NOW)).ready
    assert verdict(age=5, tracker=Tracker(200, NOW)).ready


def test_a_tracker_that_is_behind_does_not():
    told = verdict(age=5, tracker=Tracker(50, NOW))
    assert not told.ready
    assert "tracker is not there yet" in told.reason


def test_a_tracker_that_is_older_than_the_files_does_not():
    """A run that went back to step 80 writes 100 again while the tracker still says 200."""
    assert not verdict(age=5, tracker=Tracker(200, NOW - 10 * SECOND)).ready


def test_what_is_not_whole_waits_until_it_will_not_become_so():
    waiting = verdict(age=5, tracker=Tracker(100, NOW), whole=False)
    assert (waiting.ready, waiting.reason) == (False, "not whole yet: rank 3 has no directory")
    assert verdict(age=5, still=301, whole=False).ready  # converting it says what is wrong


@pytest.mark.parametrize(
    ("name", "text", "step"),
    [
        ("latest_checkpointed_iteration.txt", "120\n", 120),
        ("latest", "global_step70", 70),
        ("latest_checkpointed_iteration.txt", "release", None),
        ("latest_checkpointed_iteration.txt", "", None),
        ("other", "5", None),
    ],
)
def test_trackers(tmp_path, name, text, step):
    (tmp_path / name).write_text(text)
    tracker = read_tracker(tmp_path)
    assert (tracker.step if tracker else None) == step


def test_a_pipe_for_a_tracker_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "latest_checkpointed_iteration.txt")
    (tmp_path / "latest").write_text("global_step70")
    tracker = read_tracker(tmp_path)
    assert tracker is not None
    assert tracker.step == 70


def test_a_config_that_comes_later_or_changes_is_seen(tmp_path):
    """A trainer may write it after the weights, beside their folder."""
    weights = tmp_path / "step_1" / "pytorch_model_fsdp_0"
    tree(tmp_path, "step_1/pytorch_model_fsdp_0/.metadata", "step_1/trainer_state.json")
    looks = []

    def look() -> None:
        (c,) = discover(tmp_path)
        looks.append(look_at(c))

    look()
    (weights.parent / "config.json").write_text('{"model_type": "llama"}')
    look()
    assert looks[-1].newest_ns >= (weights.parent / "config.json").stat().st_mtime_ns
    (weights.parent / "trainer_state.json").write_text("more")
    look()
    assert looks[-1].digest == looks[-2].digest
    (weights.parent / "tokenizer.json").write_text("{}")
    look()
    assert len({seen.digest for seen in looks}) == 3


def test_a_snapshot_sees_every_change(tmp_path):
    tree(tmp_path, "a", "below/b")
    seen = [snapshot(tmp_path).digest]
    (tmp_path / "a").write_text("x")
    seen.append(snapshot(tmp_path).digest)
    os.utime(tmp_path / "below/b", ns=(1, 1))
    seen.append(snapshot(tmp_path).digest)
    (tmp_path / "below/b").rename(tmp_path / "below/c")
    seen.append(snapshot(tmp_path).digest)
    assert len(set(seen)) == 4
    assert snapshot(tmp_path).digest == seen[-1]


# The ledger


@given(
    total=st.integers(1, 64 * 10**9),
    own=st.integers(0, 10**9),
    jobs=st.integers(1, 40),
    steps=st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40),
)
def test_the_shares_never_exceed_the_budget(total, own, jobs, steps):
    floor = 440 * 10**6
    if total < own + floor + 40 * 10**6:
        total += own + floor + 40 * 10**6
    ledger = Ledger(total, own, floor, jobs)
    out = {}
    for job, alone in steps:
        name = str(job)
        if name in out:
            ledger.release(name)
            del out[name]
        elif (share := ledger.grant(name, alone=alone)) is not None:
            assert share >= floor
            out[name] = share
        assert own + sum(out.values()) <= total
        assert ledger.granted_bytes == sum(out.values())
        assert len(out) <= jobs


def test_the_smallest_budget_that_is_named_works():
    with pytest.raises(BudgetError) as told:
        Ledger(100 * 10**6, 50 * 10**6, 440 * 10**6, 4)
    words = str(told.value).split()
    named_bytes = int(words[words.index("--max-mem") + 1].removesuffix("MB")) * 10**6
    assert Ledger(named_bytes, 50 * 10**6, 440 * 10**6, 4).slots == 1


def test_where_no_model_could_be_loaded_those_that_are_known_are_converted():
    def slots(total_bytes: int, jobs: int) -> int:
        return Ledger(
            total_bytes, 50 * 10**6, 440 * 10**6, jobs, known_floor_bytes=64 * 10**6
        ).slots

    assert slots(300 * 10**6, 4) == 3
    assert slots(300 * 10**6, 2) == 2
    assert slots(600 * 10**6, 4) == 1  # which may be of any model
    with pytest.raises(BudgetError, match="too small for a batch"):
        slots(100 * 10**6, 4)


def test_a_job_that_needs_everything_waits_until_it_is_alone():
    ledger = Ledger(2 * 10**9, 0, 10**8, 2)
    share = ledger.grant("a")
    assert ledger.grant("big", alone=True) is None
    ledger.release("a")
    assert ledger.grant("big", alone=True) == ledger.whole_bytes >= 2 * share - 1
    assert ledger.grant("b") is None


# Retention


@given(
    steps=st.sets(st.integers(0, 1000)),
    last=st.none() | st.integers(1, 5),
    every=st.none() | st.integers(1, 100),
)
def test_what_is_kept(steps, last, every):
    kept = Rule(last, every).kept(steps)
    assert kept <= steps
    if last is None and every is None:
        assert kept == steps
    if steps and last is not None:
        assert set(sorted(steps)[-last:]) <= kept
    for step in steps - kept:
        assert every is None or step % every
        assert last is None or len([s for s in steps if s > step]) >= last


def test_retention_counts_by_run_and_model_and_leaves_what_has_no_step():
    records = [
        Record(f"{run}{model}{step}", "", run=run, model=model, step=step)
        for run in "ab"
        for model in "xy"
        for step in (1, 2)
    ]
    records.append(Record("none", "", run="a", model="x", step=None))
    assert [r.name for r in Rule(last=1).surplus(records)] == ["ax1", "ay1", "bx1", "by1"]


# Settings

RUN = {"root": "/r", "output": "/o"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"run": [{**RUN, "evry": 10}]}, "did you mean every?"),
        ({"maxmem": "1GB", "run": [RUN]}, "did you mean max-mem?"),
        ({"dtype": "bfloat16", "run": [RUN]}, "belongs into [[run]]"),
        ({"run": [{**RUN, "jobs": 3}]}, "belongs at the top"),
        ({"run": [{"root": "/r"}]}, "run 1: output is missing"),
        ({"run": []}, "run: "),
        ({"run": [{**RUN, "steps": "a-b"}]}, "not a range of steps"),
        ({"run": [{**RUN, "name": "{nope}"}]}, "unknown field"),
        ({"run": [{**RUN, "dtype": "int4"}]}, "run 1: dtype: expected 'keep', 'auto'"),
        ({"run": [RUN], "watch": "sometimes"}, "not a schedule"),
        ({"run": [RUN], "jobs": 0}, "jobs: "),
        ({"run": [{**RUN, "keep-last": True}]}, "run 1: keep-last: expected a number"),
        ({"run": [{**RUN, "base": "a\0b"}]}, "run 1: base: a path cannot hold a NUL"),
        ({"run": [{**RUN, "name": "{step:99999999999999d}"}]}, "not a template"),
        ({"run": [RUN, RUN]}, "same output folder"),
        ({"run": [{"root": "/r", "output": "/r"}]}, "the run itself"),
    ],
)
def test_bad_settings_are_refused_with_a_word_of_help(data, words):
    with pytest.raises(UsageError) as told:
        settings(data)
    assert words in str(told.value)


def test_what_is_wrong_with_a_run_is_told_once():
    with pytest.raises(UsageError) as caught:
        settings({"run": [{**RUN, "evry": 10}]})
    assert caught.value.found == "run 1: unknown key evry: did you mean every?"


def test_one_output_folder_is_one_by_whatever_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "models")
    file = tmp_path / "jobs.toml"
    for other in (str(tmp_path / "models"), "x/../models", "link"):
        file.write_text(
            f'[[run]]\nroot = "a"\noutput = "models"\n[[run]]\nroot = "b"\noutput = "{other}"\n'
        )
        with pytest.raises(UsageError, match="same output folder"):
            load(file, {})


def test_paths_that_go_up_are_relative_to_the_job_file(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs" / "jobs.toml"
    file.write_text(
        '[[run]]\nroot = "../runs/a"\noutput = "../models"\nhf-config = "x/../config"\n'
    )
    monkeypatch.chdir("/")
    (run,) = load(file, {}).run
    assert (run.root, run.output) == (tmp_path / "runs/a", tmp_path / "models")
    assert run.hf_config == tmp_path / "jobs/config"
    monkeypatch.chdir(tmp_path / "jobs")
    (run,) = settings({"run": [{"root": "../runs/a", "output": "out"}]}).run
    assert (run.root, run.output) == (tmp_path / "runs/a", Path("out"))


def test_a_job_file_that_is_nested_too_deeply_is_refused(tmp_path):
    file = tmp_path / "jobs.toml"
    file.write_text("x = " + "[" * 5000 + "]" * 5000)
    with pytest.raises(UsageError, match="not a TOML file"):
        load(file, {})


def test_a_job_file(tmp_path):
    file = tmp_path / "jobs.toml"
    file.write_text(
        'max-mem = "8GB"\njobs = 2\n'
        '[[run]]\nroot = "runs/a"\noutput = "/models/a"\nevery = 100\nkeep-dtype = ["*.gate.*"]\n'
        '[[run]]\nroot = "runs/b"\noutput = "b"\nmax-shard-size = "2GB"\n'
        'hf-config = "config"\nbase = "model"\n'
    )
    made = load(file, {"jobs": 3})
    assert (made.max_mem, made.jobs) == ("8GB", 3)
    assert [r.root for r in made.run] == [tmp_path / "runs/a", tmp_path / "runs/b"]
    assert [r.output for r in made.run] == [Path("/models/a"), tmp_path / "b"]
    one = candidate_at(tmp_path, tmp_path / "step_1", "dcp")
    assert made.run[0].job_options(one).keep_dtype == ("*.gate.*",)
    assert made.run[1].job_options(one).max_shard_bytes == 2 * 10**9
    assert made.run[1].job_options(one).hf_config == tmp_path / "config"
    assert made.run[1].job_options(one).lora.base == tmp_path / "model"


def test_what_is_said_beside_a_job_file_counts_though_it_is_the_default(tmp_path, monkeypatch):
    file = tmp_path / "jobs.toml"
    file.write_text('jobs = 4\nretries = 9\n[[run]]\nroot = "a"\noutput = "b"\n')
    seen = []

    class Stub:
        def __init__(self, settings, _):
            seen.append(settings)

        def round(self):
            raise UsageError("enough")

    monkeypatch.setattr("streamconv.batch.cycle.Batch", Stub)
    CliRunner().invoke(app, ["batch", str(file), "--jobs", "1", "--io-threads", "1"])
    assert (seen[0].jobs, seen[0].retries, seen[0].io_threads) == (1, 9, 1)


@pytest.mark.parametrize("text", ["max-mem =", "\xff"])
def test_a_job_file_that_is_no_toml(tmp_path, text):
    file = tmp_path / "jobs.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="TOML"):
        load(file, {})


def test_a_batch_knows_every_option_of_a_single_conversion():
    """An option that one gets and the other does not would be missed in silence."""
    own = {"max_shard_bytes": "max_shard_size"}
    job = {own.get(f.name, f.name) for f in dataclasses.fields(JobOptions)}
    job -= {"average"}  # of several checkpoints
    assert job <= set(RunSettings.model_fields)
    own = {"sync": "no_sync", "source_crc": "no_source_crc", "sha256": "checksum"}
    own |= {"max_mem_bytes": "max_mem", "cache": "no_cache"}
    how = {own.get(f.name, f.name) for f in dataclasses.fields(RunOptions)}
    how -= {"on_event", "cancel"}  # for calls alone
    assert how <= set(RunSettings.model_fields) | set(BatchSettings.model_fields)


# Metrics


def test_metrics_say_everything_and_escape_names():
    text = metrics.render(
        [
            Record('a"b', "", run='a"b', step=3, state="done", finished_at=5.5, write_bytes=7),
            Record("c", "", run='a"b', step=9, state="failed", attempts=2),
        ]
    )
    lines = text.splitlines()
    assert 'streamconv_checkpoints{run="a\\"b",state="done"} 1' in lines
    assert 'streamconv_checkpoints{run="a\\"b",state="failed"} 1' in lines
    assert 'streamconv_last_step{run="a\\"b"} 3' in lines
    assert 'streamconv_last_success_timestamp_seconds{run="a\\"b"} 5.5' in lines
    assert 'streamconv_failed_attempts{run="a\\"b"} 2' in lines


def test_machines_of_their_own_get_the_whole_budget_each():
    ledger = EachItsOwn(10**9, jobs=2)
    assert [ledger.grant("a"), ledger.grant("b", alone=True), ledger.grant("c")] == [
        10**9,
        10**9,
        None,
    ]
    assert not ledger.can_grant_more
    ledger.release("a")
    assert ledger.grant("c") == 10**9


def test_a_batch_names_its_cluster():
    with pytest.raises(UsageError, match="takes ray"):
        settings({"nodes": "slurm", "run": [{"root": "a", "output": "b"}]})


def test_what_a_machine_is_sent_has_no_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = JobOptions(hf_config=Path("hf"), lora=LoraOptions(base=Path("base")))
    request = {"source": "run", "output": "s3://b/x", "report": None, "job": options.to_json()}
    sent = relay._absolute(request)
    assert (sent["source"], sent["output"], sent["report"]) == (f"{tmp_path}/run", "s3://b/x", None)
    assert sent["job"]["hf_config"] == f"{tmp_path}/hf"
    assert sent["job"]["lora"]["base"] == f"{tmp_path}/base"


def test_a_worker_that_dies_on_its_machine_is_an_error_with_its_last_words(monkeypatch):
    code = "import sys; print('hello'); print('the end', file=sys.stderr); sys.exit(7)"
    monkeypatch.setattr(relay.worker, "command", lambda: [sys.executable, "-c", code])
    *lines, last = relay.run_there(json.dumps({"source": "run"}))
    assert lines == ["hello\n"]
    told = json.loads(last)
    assert (told["event"], told["kind"], told["where"]) == ("error", "crashed", "run")
    assert "the end" in told["found"]
