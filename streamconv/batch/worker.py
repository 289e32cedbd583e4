"""One conversion in a process of its own: a crash of it does not crash the batch.

Reads one JSON request on stdin and writes events as JSON lines to stdout; the last one is
``finished`` or ``error``. Ends when the process that started it does.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamconv.batch.evidence import output_evidence
from streamconv.errors import StreamconvError, VerificationError
from streamconv.storage.address import place
from streamconv.system.signals import WORKER_GRACE_SECONDS, end_with_parent, heeded


def command() -> list[str]:
    """Return the command line of a worker; -P as for the planning child."""
    return [sys.executable, "-P", "-m", "streamconv.batch.worker"]


def _say(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Do what the request on stdin asks for."""
    with heeded(WORKER_GRACE_SECONDS):
        return _work()


def _work() -> int:
    request = json.load(sys.stdin)
    if not end_with_parent(signal.SIGTERM, request["parent"]):
        return 1
    try:
        _say({"event": "finished", **_convert(request)})
    except StreamconvError as error:
        _say({"event": "error", **error.to_json()})
        return error.exit_code
    except (OSError, MemoryError) as error:
        told = StreamconvError.of_system(error)
        _say({"event": "error", **told.to_json()})
        return told.exit_code
    return 0


def _convert(request: dict[str, Any]) -> dict[str, Any]:
    from streamconv.conversion.job import convert
    from streamconv.files.inputs import reading
    from streamconv.files.names import MANIFEST
    from streamconv.options import Event, JobOptions, RunOptions
    from streamconv.output.manifest import read_manifest

    def on_event(event: Event) -> None:
        _say(event.to_json())

    source, output = place(request["source"]), place(request["output"])
    job = JobOptions.from_json(request["job"])
    run = RunOptions(**request["run"], on_event=on_event)
    with reading(source, job.hf_config, job.lora.base, but=output):
        if request["report"]:
            from streamconv.report.conversion import convert_reported

            result = convert_reported(
                Path(request["report"]),
                lambda watched: convert(source, output, job, watched),
                run,
                notice_refusal=True,
            )
        else:
            result = convert(source, output, job, run)
    verified = None
    if request["verify"]:
        from streamconv import api

        _say({"event": "phase", "text": "verify"})
        report = api.verify(
            output,
            source=source,
            hf_config=job.hf_config,
            base=job.lora.base,  # an adapter's names are checked there
            max_mem=run.max_mem_bytes,
        )
        if not report.passed:
            raise VerificationError(
                "the output differs from its source",
                where=str(output),
                found="; ".join(report.problems[:3]),
            )
        verified = True
    manifest = read_manifest(output) or {}
    names = [f["name"] for f in manifest.get("files", ())]
    evidence = output_evidence(output, [*names, MANIFEST])
    return {
        **asdict(result),
        "output": str(output),
        "verified": verified,
        "evidence": evidence,
    }


if __name__ == "__main__":
    sys.exit(main())
