"""The identity of a job: which source, which options. Equal identities make equal outputs.

A job's digest is cheap to take (the ends of the rank files, the side files), so that a rerun of a
finished job is recognized without planning it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from streamconv.files.jsonfile import COUNT, TEXT, Leaf, mismatches
from streamconv.ir.source import SourceFile
from streamconv.options import JobOptions, differing_flags

if TYPE_CHECKING:
    from streamconv.ir.planned import SideFile

SCHEMA = 1
_DEFAULTS = JobOptions().to_json()
_ENTRY = Leaf(
    "what identifies a file",
    lambda v: isinstance(v, list) and bool(v) and all(type(x) in (str, int) for x in v),
)
_SHAPE: dict[str, Any] = {
    "schema": COUNT,
    "format": TEXT,
    "options": {},
    "source": [_ENTRY],
    "side": [(TEXT, TEXT)],
    "inputs?": [_ENTRY],
    "given": {"hf_config": TEXT.or_null(), "model": TEXT.or_null()},
    "base?": TEXT.or_null(),
    "others?": [TEXT],
    "digest": TEXT,
}


def chosen_options(options: JobOptions) -> dict[str, Any]:
    """Return the options that differ from the defaults, without the paths among them.

    Only these are hashed: a release that adds an option must not turn every output that is there
    into another job's. One that changes a default must raise ``SCHEMA``.
    """
    return {k: v for k, v in _without_paths(options).items() if v != _DEFAULTS[k]}


def _without_paths(options: JobOptions) -> dict[str, Any]:
    given = options.to_json()
    # What lies there takes part as one of the inputs.
    given["lora"]["base"] = None
    if given["average"] is not None:
        given["average"]["sources"] = []
    return {k: v for k, v in given.items() if k not in ("hf_config", "model")}


def identified(file: SourceFile) -> list[str | int]:
    """Return what identifies a file of the source: name, size, and what stands for its bytes."""
    return [file.path, file.nbytes, " ".join(filter(None, (file.directory_hash, file.evidence)))]


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """What makes a job this job: made once before it is planned, and compared before a byte moves.

    ``source`` are the files as :func:`identified`, ``side`` the files beside the weights with their
    hashes, ``inputs`` what else takes part. ``hf_config``, ``model``, ``base`` and ``others`` say where
    the config came from, which model was picked, and where the base model lies and what is averaged
    with the source: they do not enter the digest, but are of use to whoever plans it again.
    """

    schema: int
    format: str
    options: Mapping[str, Any]
    source: tuple[tuple[str | int, ...], ...]
    side: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str | int, ...], ...]
    hf_config: str | None
    model: str | None
    base: str | None
    others: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Return what stands for all of it."""
        chosen = {k: v for k, v in self.options.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}
        hashed = {**self._hashed(), "options": chosen}
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())

    def _hashed(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "schema": self.schema,
            "format": self.format,
            "options": dict(self.options),
            "source": [list(f) for f in self.source],
            "side": [list(s) for s in self.side],
        }
        if self.inputs:
            data["inputs"] = [list(i) for i in self.inputs]
        return data

    def to_json(self) -> dict[str, Any]:
        """Return the identity as plans and manifests have it."""
        given = {"hf_config": self.hf_config, "model": self.model}
        data = {**self._hashed(), "given": given, "digest": self.digest}
        data |= {} if self.base is None else {"base": self.base}
        return data | ({"others": list(self.others)} if self.others else {})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> JobIdentity:
        """Rebuild an identity from :meth:`to_json`; raises ``ValueError`` for what is not one."""
        wrong = next(mismatches(data, _SHAPE), None)
        if wrong is not None:
            raise ValueError(f"the job: {wrong}")
        given = data["given"]
        found = JobIdentity(
            data["schema"],
            data["format"],
            data["options"],
            tuple(tuple(f) for f in data["source"]),
            tuple((name, xxh3) for name, xxh3 in data["side"]),
            tuple(tuple(i) for i in data.get("inputs", ())),
            given["hf_config"],
            given["model"],
            data.get("base"),
            tuple(data.get("others", ())),
        )
        if found.digest != data["digest"]:
            raise ValueError(f"the job's digest is {found.digest}, and said to be {data['digest']}")
        return found


def why_another(before: Mapping[str, Any], job: JobIdentity) -> str:
    """Return in words in what two jobs differ, as far as a user can tell from it what to do."""
    now = job.to_json()
    other = "another job's"
    differing = _differing(before, now)
    if differing:
        return f"{other}: {'; '.join(differing)}"
    if before.get("schema") != now.get("schema"):
        return f"{other}: that of another release"
    files = [[*j.get("source", ()), *j.get("inputs", ())] for j in (before, now)]
    if [f[:-1] for f in files[0]] != [f[:-1] for f in files[1]]:
        return f"{other}: it was made of another checkpoint, whose files have other names or sizes"
    anew = [(old[-1], new[-1]) for old, new in zip(*files, strict=True) if old != new]
    if all(str(old).partition(" ")[0] == str(new).partition(" ")[0] for old, new in anew):
        # Then it is the evidence that differs.
        return (
            "of another checkpoint with files of these names and sizes, or of these files before they "
            f"were rewritten, or copied without their times (nothing in {len(anew)} of them is a "
            "checksum of the weights, so times and samples count)"
        )
    return (
        "of another checkpoint with files of these names and sizes, or of this checkpoint before its "
        "files were rewritten"
    )


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words which options, kinds of checkpoint and side files differ."""
    options = [j.get("options") or {} for j in (before, now)]
    words = [f"made with {text}" for text in differing_flags(*options)]
    if before.get("format") != now.get("format"):
        words.append(f"made of a {before.get('format')} checkpoint, now {now.get('format')}")
    models = [{i[0]: i[-1] for i in j.get("inputs", ())}.get("--model") for j in (before, now)]
    if models[0] != models[1]:
        words.append(f"made with --model {models[0]}" if models[0] else "made without --model")
    side = [dict(j.get("side") or ()) for j in (before, now)]
    names = [n for n in sorted(side[0].keys() | side[1].keys()) if side[0].get(n) != side[1].get(n)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        words.append(f"made with another {', '.join(names[:3])}{more}")
    return words


def job_identity(
    format_name: str,
    files: Iterable[SourceFile],
    side: Iterable[SideFile],
    options: JobOptions,
    inputs: Iterable[Sequence[str | int]] = (),
    others: Iterable[Path] = (),
) -> JobIdentity:
    """Return what makes a job this job.

    ``inputs`` are what else takes part, each with what identifies it (``planning.inputs``),
    ``others`` where the checkpoints lie that the source is averaged with.
    Paths are relative, so that a checkpoint that was moved is still the same. Where the central
    directory's hash covers every record's CRC-32, times are left out; elsewhere a file's evidence tells
    whether it was rewritten.
    """
    base = options.lora.base
    return JobIdentity(
        schema=SCHEMA,
        format=format_name,
        options=_without_paths(options),
        source=tuple(tuple(identified(f)) for f in files),
        side=tuple((s.name, s.xxh3) for s in side),
        inputs=tuple(tuple(i) for i in inputs),
        hf_config=str(options.hf_config.absolute()) if options.hf_config else None,
        model=options.model,
        base=str(base.absolute()) if base else None,
        others=tuple(str(o) for o in others),
    )
