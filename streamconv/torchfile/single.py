"""One torch file with everything in it: ``model.pt``, ``pytorch_model.bin``, a Lightning ``.ckpt``.

The tensors lie in dicts, maybe below keys of a trainer's (``{"state_dict": {…}, "callbacks": {…}}``),
beside objects of any class: those become inert records that nobody looks into. A tensor is named by the
keys that lead to it, joined by dots. What lies in lists is a trainer's (optimizer states).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.errors import BadInputError
from streamconv.torchfile.inert import Inert, InertDict
from streamconv.torchfile.opened import opened
from streamconv.torchfile.rankfile import Contents, RankReader, Stored
from streamconv.torchfile.unpickle import MAX_PICKLE_NBYTES
from streamconv.torchfile.values import TENSOR_CALLS, name_of
from streamconv.torchfile.zipdir import ZipDirectory

_DEEPEST = 8
# What a layer keeps beside its weights may be of any class (Transformer Engine).
_EXTRA = "_extra_state"
# Where Lightning keeps what callbacks and loops count, objects beside tensors.
_NO_WEIGHTS = ("callbacks.", "loops.")


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The tensors of a file by name; ``nested`` says that a trainer's keys lead to them.

    ``skipped`` are (name, reason) of values that are not tensors. ``prefix`` precedes the names of a
    zip's entries; it is empty for a file of the old format.
    """

    tensors: dict[str, Stored]
    skipped: tuple[tuple[str, str], ...]
    nested: bool
    prefix: str


def read_torch_file(path: Path) -> TorchFile:
    """Read the metadata of a file; no byte of a weight is read.

    Raises :class:`BadInputError` for a damaged file or one without tensors, :class:`UnsafeInputError`
    for a hostile one.
    """
    with opened(path, max_pickle_nbytes=MAX_PICKLE_NBYTES) as (_, directory, root):
        return _contents(root, directory)


def _contents(root: Any, directory: ZipDirectory) -> TorchFile:
    where = directory.window.name
    if type(root) not in (dict, InertDict):
        raise BadInputError(
            "the file holds no state dict",
            where=where,
            expected="a dict of tensors",
            found=name_of(root),
        )
    contents = Contents(RankReader(), directory, 0)
    nested = False
    numbered = False
    for prefix, state_dict in _state_dicts(root, "", set()):
        nested = nested or prefix != ""
        for key, value in state_dict.items():
            if type(value) in (dict, InertDict):
                continue
            if type(key) is not str:
                numbered = True
                name = f"{prefix}{str(key)[:40]}"
                contents.skipped.append((name, f"its key is of type {type(key).__name__}, no name"))
                continue
            name = prefix + key
            if isinstance(value, Inert) and type(value) not in TENSOR_CALLS:
                if not (name.endswith(_EXTRA) or name.startswith(_NO_WEIGHTS)):
                    raise BadInputError(
                        "a weight is stored as something other than a tensor",
                        where=f"{where}, {name[:200]}",
                        found=name_of(value),
                    )
                contents.skipped.append((name, f"a {name_of(value)}, not a tensor"))
            else:
                contents.add(name, value)
    if not contents.tensors:
        kinds = [*dict.fromkeys(name_of(v) for v in root.values())][:4]
        raise BadInputError(
            "the file holds no tensors by names",
            where=where,
            expected="a dict of tensors by their names, maybe below a trainer's keys",
            found="tensors by numbers"
            if numbered
            else f"a dict of {', '.join(kinds) or 'nothing'}",
        )
    return TorchFile(contents.tensors, tuple(contents.skipped), nested, directory.prefix)


def _state_dicts(
    value: dict[Any, Any], prefix: str, seen: set[int]
) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield the dicts that hold tensors, with the keys that lead there; objects are not entered.

    One dict under two keys, which may be within itself, is one model and not two.
    """
    seen.add(id(value))
    if any(type(v) in TENSOR_CALLS for v in value.values()):
        yield prefix, value
    for key, inner in value.items():
        # An optimizer's states are numbered, as its parameters are.
        if (
            type(key) is str
            and type(inner) in (dict, InertDict)
            and id(inner) not in seen
            and prefix.count(".") < _DEEPEST
        ):
            yield from _state_dicts(inner, f"{prefix}{key}.", seen)
