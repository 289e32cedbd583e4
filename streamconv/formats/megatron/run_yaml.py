"""Settings of a model in a trainer's YAML: Megatron-Bridge's run_config.yaml, NeMo's model.yaml.

Both are strangers' files, and full of classes to be made (``_target_``). Nothing is made of them: the
parser's events are walked one by one, without recursion, and what is kept are plain numbers, texts,
truth values and short lists of them, directly below the keys asked for. An alias stands for such a
value, or for nothing, so that none can grow.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from streamconv.errors import StreamconvError
from streamconv.files.inputs import opened

_MAX_NBYTES = 1 << 20
_MAX_DEPTH = 64
_MAX_LISTED = 1024
_MAX_TEXT = 256
_INT = re.compile(r"[-+]?[0-9]{1,18}", re.ASCII)
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", re.ASCII)
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_NOTHING = object()


def settings_below(path: Path, keys: tuple[str, ...], wanted: Container[str]) -> dict[str, object]:
    """Return the ``wanted`` settings below ``keys``; none where the file cannot be read as such."""
    try:
        with opened(path) as file:
            if file.status.st_size > _MAX_NBYTES:
                return {}
            text = file.pread(_MAX_NBYTES, 0)
    except (StreamconvError, OSError):
        return {}
    return _settings(text, keys, wanted)


def _settings(text: bytes, keys: tuple[str, ...], wanted: Container[str]) -> dict[str, object]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, object] = {}
    try:
        for path, value in _leaves(yaml.parse(text, Loader=loader)):
            if path[:-1] == keys and path[-1] in wanted:
                found[path[-1]] = value
    except (yaml.YAMLError, ValueError, RecursionError, MemoryError):
        return {}
    return found


def _leaves(events: Iterator[Any]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the keys that lead to each plain value, or short list of them, in the first document."""
    anchors: dict[str, object] = {}
    walk = _Walk()
    for event in events:
        kind = type(event).__name__
        if kind == "DocumentEndEvent":
            return
        if kind in ("MappingStartEvent", "SequenceStartEvent"):
            walk.enter(kind == "SequenceStartEvent", event.anchor)
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            path, value, anchor = walk.leave()
            if anchor:
                anchors[anchor] = value
            if value is not _NOTHING:
                yield path, value
        elif kind in ("ScalarEvent", "AliasEvent"):
            if kind == "AliasEvent":
                value = anchors.get(event.anchor, _NOTHING)
            else:
                value = _scalar(event)
                if event.anchor:
                    anchors[event.anchor] = value
            at = walk.take(value)
            if at is not None and value is not _NOTHING:
                yield at, value


class _Walk:
    """Where in the nesting the parser stands."""

    def __init__(self) -> None:
        self._open: list[_Level] = []

    def enter(self, is_list: bool, anchor: str | None) -> None:
        """Begin a mapping or a list."""
        if len(self._open) >= _MAX_DEPTH:
            raise ValueError("nested too deep")
        self._open.append(_Level(is_list, anchor))

    def leave(self) -> tuple[tuple[str, ...], object, str | None]:
        """End one; return the keys that lead to it, its value where it is a plain list, its anchor."""
        level = self._open.pop()
        value: object = level.values if level.is_list and level.plain else _NOTHING
        path = self._path()
        self._done(_NOTHING)
        return path, value, level.anchor

    def take(self, value: object) -> tuple[str, ...] | None:
        """Take in a key, an element or a value; return the keys that lead to it if it is a value."""
        if not self._open:
            return None
        level = self._open[-1]
        if level.is_list or level.key is not None:
            path = None if level.is_list else self._path()
            self._done(value)
            return path
        level.key = value if isinstance(value, str) else ""
        return None

    def _path(self) -> tuple[str, ...]:
        return tuple(level.key or "" for level in self._open)

    def _done(self, value: object) -> None:
        if not self._open:
            return
        level = self._open[-1]
        if not level.is_list:
            level.key = None if level.key is not None else ""
        elif value is _NOTHING or isinstance(value, list) or len(level.values) >= _MAX_LISTED:
            level.plain = False
            level.values = []
        elif level.plain:
            level.values.append(value)


class _Level:
    """A mapping or a list that is open: the key whose value comes, or the elements so far."""

    def __init__(self, is_list: bool, anchor: str | None) -> None:
        self.is_list = is_list
        self.anchor = anchor
        self.key: str | None = None
        self.plain = True
        self.values: list[object] = []


def _scalar(event: Any) -> object:
    """Return a plain value; floats as OmegaConf writes them (``1e-06``), too, are numbers."""
    text = event.value
    if len(text) > _MAX_TEXT:
        return _NOTHING
    if not event.implicit[0]:
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
