"""One rank file of Megatron: the state dict of each virtual stage, and what the run says of itself.

verl wrote a list of state dicts. Megatron-LM writes a dict with ``model``, or ``model0``, ``model1``
and so on with virtual stages, beside ``args`` (an argparse.Namespace), ``optimizer``, ``rng_state`` and
more, whose classes are Megatron's, numpy's and Python's. Only the state dicts are looked into; of
``args`` the plain numbers and texts are taken. Every other global becomes an inert record.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError
from streamconv.torchfile.inert import Inert, InertDict
from streamconv.torchfile.rankfile import Contents, RankReader, Stored, open_archive
from streamconv.torchfile.unpickle import load_inert, no_garbage_collection
from streamconv.torchfile.values import name_of

_MODEL = re.compile(r"model(\d*)", re.ASCII)
_PLAIN = (int, float, bool, str)
_MAX_LISTED = 1024
_MAX_PICKLE_NBYTES = 256 << 20  # the optimizer's tree is in there too


@dataclass(frozen=True, slots=True)
class StageFile:
    """What one rank file holds; no byte of a weight has been read.

    ``stages`` has one dict of tensors a virtual stage, ``args`` the plain values of the run's
    arguments. ``skipped`` counts what is not a weight, by what it is.
    """

    path: Path
    nbytes: int
    mtime_ns: int
    prefix: str
    directory_hash: str
    checksums: bool
    stages: tuple[Mapping[str, Stored], ...]
    args: Mapping[str, object]
    skipped: Counter[str]


def read_stage_file(
    reader: RankReader, path: Path, why_no_weight: Callable[[str], str]
) -> StageFile:
    """Read the file ``path``; ``why_no_weight`` says what a name is where it is not a weight.

    Raises :class:`BadInputError` and :class:`UnsafeInputError`, with the file and the name.
    """
    where = str(path)
    skipped: Counter[str] = Counter()
    with open_archive(path) as (status, directory), no_garbage_collection():
        root = load_inert(
            directory.read_entry("data.pkl", max_nbytes=_MAX_PICKLE_NBYTES),
            where,
            unknown="keep",
            max_nbytes=_MAX_PICKLE_NBYTES,
        )
        stages = []
        for state_dict in _state_dicts(root, where, skipped, why_no_weight):
            contents = Contents(reader, directory, 0)
            for name, value in state_dict.items():
                reason = why_no_weight(name) if type(name) is str else ""
                if not reason and value is None:
                    reason = "None, not a tensor"
                if reason:
                    skipped[reason] += 1
                else:
                    contents.add(name, value)
            contents.refuse_others()
            stages.append(contents.plain("Megatron's rank files"))
        args = _plain_args(root)
    return StageFile(
        path,
        status.st_size,
        status.st_mtime_ns,
        directory.prefix,
        directory.directory_hash,
        directory.checksums,
        tuple(stages),
        args,
        skipped,
    )


def _state_dicts(
    root: Any, where: str, skipped: Counter[str], why_no_weight: Callable[[str], str]
) -> list[dict[Any, Any]]:
    if type(root) is list:
        stages = root
    elif type(root) in (dict, InertDict):
        models = {}
        for key, value in root.items():
            match = _MODEL.fullmatch(key) if type(key) is str else None
            if match:
                models[int(match[1] or 0)] = value
            else:
                skipped[why_no_weight(str(key)) or "arguments and counters of the run"] += 1
        stages = [models[n] for n in sorted(models)]
        if sorted(models) != list(range(len(models))):
            raise BadInputError(
                "the state dict of a virtual stage is missing",
                where=where,
                found=", ".join(f"model{n}" for n in sorted(models)),
            )
    else:
        stages = []
    if not stages or not all(type(s) in (dict, InertDict) for s in stages):
        raise BadInputError(
            "the file holds no state dicts of a Megatron model",
            where=where,
            expected="a list of state dicts (verl), or a dict with 'model' or 'model0' (Megatron-LM)",
            found=name_of(root),
        )
    if any(type(s.get("language_model")) in (dict, InertDict) for s in stages):
        raise BadInputError(
            "a model of Megatron-LM from before Megatron-Core, whose layout is another one",
            where=where,
            hint="convert it to Megatron-Core with that release's tools/checkpoint/convert.py first",
        )
    return stages


def _plain_args(root: Any) -> dict[str, object]:
    args: Any = root.get("args") if type(root) in (dict, InertDict) else None
    state: Any = args.state if isinstance(args, Inert) else args
    if type(state) not in (dict, InertDict):
        return {}
    return {k: v for k, v in state.items() if type(k) is str and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return len(value) <= _MAX_LISTED and all(type(v) in _PLAIN for v in value)
    return value is None or type(value) in _PLAIN
