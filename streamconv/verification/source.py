"""An output folder against its source: every tensor, by two readers that share no code.

The first reader is torch's own (:mod:`streamconv.verification.torch_check`, in a child process); what
it cannot read, and what it says differs, is looked at by the converter's byte path. The source is
planned anew with the options that the manifest names, so that neither the plan nor the journal of
the conversion is trusted.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError, UnfitValuesError, UsageError
from streamconv.files.durable import hash_file
from streamconv.files.filesystems import real_path
from streamconv.files.names import INDEX, MANIFEST
from streamconv.formats.safetensors_file import read_folder
from streamconv.ir.identity import chosen_options
from streamconv.options import JobOptions
from streamconv.planning.child import make_plan
from streamconv.planning.strays import ANOTHERS
from streamconv.storage.address import Address
from streamconv.system import memory
from streamconv.system.children import ask
from streamconv.units import counted
from streamconv.verification.beside import file_problems
from streamconv.verification.by_plan import differing_tensors, planned_tensors, wrong_headers
from streamconv.verification.folder import manifest_of
from streamconv.verification.report import Report

_STEP_BYTES = 1 << 20


def verify_source(
    folder: Path,
    src: Path,
    *,
    others: Sequence[Path] = (),
    hf_config: Path | None = None,
    max_mem_bytes: int | None = None,
) -> Report:
    """Compare every tensor of a folder with the source shards, byte by byte.

    ``others`` are the further checkpoints that an average is of, where they do not lie where they lay
    then. ``hf_config`` is used in place of the folder that the output was made with. Raises
    :class:`BadInputError` for a source that is damaged or cannot be read.
    """
    manifest = manifest_of(folder)
    job = _job(folder, manifest, src, hf_config, others)
    budget = max_mem_bytes or memory.available_bytes()[0]
    report = Report()
    held = read_folder(folder, nested=True)
    with tempfile.TemporaryDirectory(prefix="streamconv-") as scratch:
        plan = make_plan(src, job, Path(scratch) / "plan.jsonl", max_mem_bytes=budget)
        wrong = dict(wrong_headers(plan, held))
        names = {t.name for t in planned_tensors(plan)}
        if isinstance(src, Address) or isinstance(folder, Address):
            # torch.load reads files.
            left_out = dict.fromkeys(names - wrong.keys(), "torch reads no object stores")
            answer: dict[str, Any] = {"differing": {}, "left": left_out, "lost": {}, "ways": {}}
        else:
            answer = ask(
                "streamconv.verification.torch_check",
                {
                    "task": "check",
                    "src": str(src),
                    "folder": str(folder),
                    "job": job.to_json(),
                    "plan_path": str(plan.path),
                    "skip": sorted(wrong),
                    "budget_bytes": budget,
                },
                doing="reading the source with torch",
            )
        differing: dict[str, str] = answer["differing"]
        left: dict[str, str] = answer["left"]
        try:
            checks_bad, unverifiable = differing_tensors(
                plan, held, left.keys() | differing.keys(), budget
            )
        except UnfitValuesError as error:
            checks_bad, unverifiable = {*differing}, 0
            report.problems.append(f"{error.where}: {error.what} ({error.found})")
        beside = list(file_problems(folder, plan))
    made_of = dict(manifest["job"]["side"])
    renewed = [n for n, digest in plan.head.job["side"] if made_of.get(n, digest) != digest]
    report.problems += [f"{n}: the source has another one than it was made of" for n in renewed]
    # A file of weights whose tensors are not those of the source has another header for that reason.
    report.problems += [
        f"{n}: {what}"
        for n, what in beside
        if n not in renewed and not (wrong and n.endswith((".safetensors", INDEX)))
    ]
    report.checked.append(
        f"{counted(len(plan.head.side) + len(plan.head.written), 'file')} beside the weights "
        "against the source"
    )
    report.checked += _by_manifest(job, hf_config)
    report.problems += [f"{n}: {what}" for n, what in sorted(wrong.items())]
    report.problems += [
        f"{n}: infinite here, the source has {what}" for n, what in sorted(answer["lost"].items())
    ]
    for name in sorted(differing.keys() | checks_bad):
        if name in checks_bad:
            report.problems.append(f"{name}: differs from the source")
        else:
            report.problems.append(
                f"{name}: differs from the source as torch reads it ({differing[name]}), though not "
                "as streamconv does: please report this"
            )
    report.problems += [f"{n}: not in the source" for n in sorted(held.keys() - names)]
    report.checked += _ways(answer["ways"], len(differing))
    report.checked += [
        f"{counted(count, 'tensor')} against the source, byte by byte, "
        f"read by streamconv alone: {reason}"
        for reason, count in Counter(left.values()).items()
    ]
    if unverifiable:
        report.checked.append(f"{unverifiable} source bytes carry no checksum")
    return report


def _by_manifest(job: JobOptions, hf_config: Path | None) -> Iterator[str]:
    """Name what only the manifest says of how the output was made: it is for the user to know."""
    options = chosen_options(job)
    options.pop("lora", None)
    options.pop("average", None)  # of which a notice tells
    lora = {k: v for k, v in job.lora.to_json().items() if v not in (None, False, "auto")}
    given = {**options, **{f"lora {k}": v for k, v in lora.items()}}
    if job.hf_config is not None and hf_config is None:
        given["config and tokenizer from"] = str(job.hf_config)
    if job.average is not None:
        yield f"note: made, as the manifest says, of {job.average.said}"
    if given:
        text = ", ".join(
            f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in given.items()
        )
        yield f"note: made, as the manifest says, with {text}"


def _ways(ways: Mapping[str, int], differing: int) -> Iterator[str]:
    total = sum(ways.values()) + differing
    how = {
        "converted": "through transformers' own conversion",
        "converted in slices": "in slices, through the traced conversion",
        "computed": "decoded, added up or quantized by torch",
    }
    parts = [f"{ways[w]} {text}" for w, text in how.items() if ways.get(w)]
    detail = f" ({', '.join(parts)})" if parts else ""
    if total:
        yield f"{counted(total, 'tensor')} against the source, byte by byte, read by torch.load{detail}"


def _job(
    folder: Path,
    manifest: Mapping[str, Any],
    src: Path,
    hf_config: Path | None,
    others: Sequence[Path],
) -> JobOptions:
    """Return the options that the output was made with."""
    job = manifest["job"]
    given = job.get("given", {})
    for place in (given.get("hf_config") if hf_config is None else None, job.get("base")):
        if place and real_path(Path(place)).is_relative_to(real_path(folder)):
            raise BadInputError(
                "the manifest says that the output was made of itself",
                where=str(folder / MANIFEST),
                found=place,
                hint="--hf-config DIR names the folder with the source's config and tokenizer",
            )
    if hf_config is None and given.get("hf_config"):
        hf_config = _same_config(Path(given["hf_config"]), dict(job["side"]).get("config.json"))
    options = {**job["options"], "hf_config": None, "model": None}
    if base := job.get("base"):
        if not Path(base).is_dir():
            raise UsageError(
                "the base model that this output's adapter was merged into is gone",
                where=base,
                hint="put it there again, a link will do",
            )
        options["lora"] = {**options.get("lora", {}), "base": base}
    if average := options.get("average"):
        options["average"] = {**average, "sources": _others(job, others)}
    elif others:
        raise UsageError(
            "this output was made of one checkpoint",
            where=str(folder),
            found=f"--source {others[0]} besides",
        )
    try:
        made = JobOptions.from_json(options)
    except (TypeError, UsageError) as error:
        raise BadInputError(
            "the manifest names options that are not known", found=str(error)
        ) from error
    within = any(reason == ANOTHERS for _, reason in manifest.get("skipped", ()))
    return dataclasses.replace(
        made, hf_config=hf_config, model=_model(src, given.get("model"), within)
    )


def _others(job: Mapping[str, Any], given: Sequence[Path]) -> list[str]:
    """Return where the checkpoints lie that the source was averaged with: ``given``, or as then."""
    there = [str(p) for p in given] or list(job.get("others", ()))
    gone = next((p for p in there if not Path(p).exists()), None)
    if gone is not None:
        raise UsageError(
            "a checkpoint that this output is an average of is gone",
            where=gone,
            hint="--source SRC, once for each of them in their order, says where they are now",
        )
    return there


def _same_config(folder: Path, digest: str | None) -> Path:
    """Return ``folder``, which a manifest names: looked at only where its config is that output's."""
    path = folder / "config.json"
    there = path.is_file()
    if digest is None or not there or hash_file(path) != digest:
        raise UsageError(
            "the folder that this output's config came from "
            + ("holds another by now" if there else "is gone"),
            where=str(folder),
            hint="--hf-config DIR says where it is now",
        )
    return folder


def _model(src: Path, given: str | None, within: bool) -> str | None:
    """Return which model of ``src`` is meant: none where ``src`` is that model's own folder.

    ``within`` says that it was one of several in one checkpoint.
    """
    from streamconv import formats

    if given is None or within:
        return given
    try:
        location = formats.find_model(src, given)
    except UsageError:
        return None
    return given if location.root.absolute().name == given else None
