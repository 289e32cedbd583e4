"""The units in scripts/deploy: what can be said about them without a cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import streamconv
from streamconv.batch.schedule import parse_schedule
from streamconv.batch.settings import load, settings

DEPLOY = Path(__file__).resolve().parents[1] / "scripts" / "deploy"


def test_the_job_file_is_one():
    made = load(DEPLOY / "jobs.toml", {})
    assert [str(run.output) for run in made.run] == ["/models/my-run"]


def test_the_hints_in_the_job_file_are_settings_too():
    text = re.sub(r"^# (on-\w+ =)", r"\1", (DEPLOY / "jobs.toml").read_text(), flags=re.MULTILINE)
    made = settings(tomllib.loads(text))
    assert made.on_done is not None
    assert made.on_error is not None


def test_the_cron_line_is_a_schedule_and_a_command():
    (line,) = [x for x in (DEPLOY / "crontab").read_text().splitlines() if not x.startswith("#")]
    parse_schedule(" ".join(line.split()[:5]))
    assert line.endswith("streamconv batch /etc/streamconv/jobs.toml --quiet")


def test_the_cron_job():
    config, job = yaml.safe_load_all((DEPLOY / "cronjob.yaml").read_text())
    settings(tomllib.loads(config["data"]["jobs.toml"]))
    parse_schedule(job["spec"]["schedule"])
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    names = [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v]
    assert names == [config["metadata"]["name"]]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_has_nothing_to_say_against_the_units(tmp_path):
    for unit in (*DEPLOY.glob("*.service"), *DEPLOY.glob("*.timer")):
        # It looks whether the command is there; ours is wherever the user puts it.
        text = unit.read_text().replace("/opt/streamconv/bin/streamconv", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    units = sorted(str(p) for p in tmp_path.iterdir())
    assert len(units) == 3
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("memory", "expected"), [("2048", "--max-mem 1843MiB"), (None, "")], ids=["limit", "no limit"]
)
def test_the_slurm_script_hands_on_its_arguments_and_its_memory(tmp_path, memory, expected):
    tool = tmp_path / "streamconv"
    tool.write_text('#!/bin/sh\necho "$@"\n')
    tool.chmod(0o755)
    env = {**os.environ, "STREAMCONV": str(tool)}
    env.pop("SLURM_MEM_PER_NODE", None)
    if memory:
        env["SLURM_MEM_PER_NODE"] = memory
    done = subprocess.run(
        ["bash", str(DEPLOY / "slurm.sh"), "/runs/a b", "/models"],
        capture_output=True, text=True, env=env, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"batch /runs/a b /models {expected}".strip()
    alone = subprocess.run(["bash", str(DEPLOY / "slurm.sh")], capture_output=True, check=False)
    assert alone.returncode == 2


def test_the_array_job_and_the_indexed_job_write_parts(lone_rank_file, tmp_path):
    """With the variables that Slurm and Kubernetes set."""
    out = tmp_path / "out"
    streamconv.begin(lone_rank_file, out, sync=False)
    command = f"{sys.executable} -m streamconv"
    stub = tmp_path / "streamconv"
    stub.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    stub.chmod(0o755)
    slurm = {
        "STREAMCONV": str(stub),
        "SLURM_MEM_PER_NODE": "8192",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_COUNT": "1",
    }
    script = [str(DEPLOY / "slurm-parts.sh"), str(out), "--json"]
    done = subprocess.run(
        script, env=os.environ | slurm, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"status": "written"' in done.stdout
    part, finish = yaml.safe_load_all((DEPLOY / "kubernetes-parts.yaml").read_text())
    (container,) = part["spec"]["template"]["spec"]["containers"]
    share = container["command"][container["command"].index("--part") + 1]
    assert share == f"auto/{part['spec']['completions']}"
    indexed = os.environ | {"JOB_COMPLETION_INDEX": "7"}
    words = [str(out) if w == "/models/my-model" else w for w in container["command"][1:]]
    done = subprocess.run(
        [str(stub), *words], env=indexed, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (container,) = finish["spec"]["template"]["spec"]["containers"]
    words = [str(out) if w == "/models/my-model" else w for w in container["command"][1:]]
    done = subprocess.run([str(stub), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").is_file()
