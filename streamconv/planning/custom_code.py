"""Which Python files a model's custom code consists of. The code is read, and never run.

Beside the rank files of a trainer lie Python files of any kind. Those of the model are the ones that
its configs name in ``auto_map``, and what these import from the same folder, file by file.

Statements are found by their tokens and not by ``ast``: a file made for it can crash the interpreter's
parser, and a large one needs a hundred times its size there.
"""

from __future__ import annotations

import io
import itertools
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.files.jsonfile import object_or_empty

_MOST_CODE_BYTES = 4 << 20
_MOST_CONFIG_BYTES = 4 << 20
_IGNORED = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.ENCODING})
_BEFORE_A_STATEMENT = frozenset({tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT})


@dataclass(frozen=True, slots=True)
class Import:
    """What one statement imports: ``from ..pkg.mod import a`` is (2, "pkg.mod", ("a",))."""

    level: int
    module: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "." * self.level + (self.module or ", ".join(self.names))


@dataclass(frozen=True, slots=True)
class Code:
    """The files of a model's code; ``missing`` says which file asks for what that is not there."""

    files: frozenset[Path]
    missing: tuple[str, ...]


def code_of(folder: Path, known: Iterable[Path]) -> Code:
    """Return the code in ``folder`` that the configs and Python files among ``known`` need.

    Only imports from the folder itself count: what else is imported has to be installed.
    """
    files = {path for path in known if path.suffix == ".py" and path.is_file()}
    missing: list[str] = []
    for config in (path for path in known if path.name.endswith("config.json")):
        for module, elsewhere in _auto_map(config):
            found = _module(folder, module)
            files.update(found)
            if not found and not elsewhere:
                missing.append(f"{config.name} names {module}.py, which is not there")
    seen: set[Path] = set()
    while new := sorted(files - seen):
        seen.update(new)
        for path in new:
            try:
                statements = imports(path)
            except (ValueError, OSError) as error:
                missing.append(f"what {path.name} imports cannot be determined: {error}"[:200])
                continue
            for statement in statements:
                found = _found(folder, path, statement)
                files.update(found)
                if statement.level and not found:
                    name = path.relative_to(folder).as_posix()
                    missing.append(f"{name} imports {statement}, which is not there")
    return Code(frozenset(files), tuple(dict.fromkeys(missing)))


def _auto_map(config: Path) -> Iterator[tuple[str, bool]]:
    """Yield the modules of ``auto_map`` entries, and whether each is that of another repository."""
    left: list[Any] = [object_or_empty(config, most_bytes=_MOST_CONFIG_BYTES)]
    while left:
        value = left.pop()
        if not isinstance(value, dict):
            continue
        left += value.values()
        entries = value.get("auto_map")
        for entry in entries.values() if isinstance(entries, dict) else ():
            # A tokenizer has two: [slow, fast], either of which may be null.
            for reference in entry if isinstance(entry, list) else [entry]:
                if isinstance(reference, str):
                    repository, dashes, name = reference.rpartition("--")
                    yield name.rpartition(".")[0] or name, bool(dashes and repository)


def _found(folder: Path, importer: Path, statement: Import) -> list[Path]:
    """Return the files that a statement imports, its packages' ``__init__`` included."""
    place = importer.parent if statement.level else folder
    for _ in range(statement.level - 1):
        place = place.parent
    if not place.is_relative_to(folder):
        return []
    found = _module(place, statement.module) if statement.module else []
    inside = place.joinpath(*statement.module.split(".")) if statement.module else place
    # What is imported from a package may be a module of it, or something that __init__ defines.
    within = [path for name in statement.names for path in _module(inside, name)]
    initial = place / "__init__.py"
    if not (statement.module or within) and initial.is_file():
        within = [initial]
    return found + within


def _module(place: Path, name: str) -> list[Path]:
    """Return the file of the module ``name`` below ``place``, after those of its packages."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return []
    packages = [place.joinpath(*parts[:k], "__init__.py") for k in range(1, len(parts) + 1)]
    file = place.joinpath(*parts).with_suffix(".py")
    if not file.is_file() and not packages[-1].is_file():
        return []
    return [path for path in (*packages, file) if path.is_file()]


def imports(path: Path) -> list[Import]:
    """Return every import of a Python file, wherever in it; raises ``ValueError`` for what is none."""
    if path.stat().st_size > _MOST_CODE_BYTES:
        raise ValueError(f"it is larger than {_MOST_CODE_BYTES} bytes")
    try:
        tokens = tokenize.tokenize(io.BytesIO(path.read_bytes()).readline)
        return [
            made
            for statement in _statements(tokens)
            if statement[0] in ("import", "from")
            for made in _parsed(statement)
        ]
    except (tokenize.TokenError, SyntaxError, UnicodeError) as error:
        raise ValueError("not valid Python") from error


def _statements(tokens: Iterable[tokenize.TokenInfo]) -> Iterator[list[str]]:
    """Yield the beginnings of simple statements as words; of those that import all of it."""
    words: list[str] = []
    depth = 0
    for token in tokens:
        if token.type in _IGNORED:
            continue
        if token.type in _BEFORE_A_STATEMENT or (depth == 0 and token.string in (";", ":")):
            if words:
                yield words
            words = []
            continue
        if token.type == tokenize.OP:
            depth = max(0, depth + (token.string in "([{") - (token.string in ")]}"))
        if not words or words[0] in ("import", "from"):
            words.append(token.string)
    if words:
        yield words


def _parsed(words: list[str]) -> Iterator[Import]:
    if words[0] == "import":
        for name in _listed(words[1:]):
            yield Import(0, name)
        return
    if "import" not in words:
        return
    at = words.index("import")
    source = "".join(words[1:at])  # the tokens are ".", "..." and names
    module = source.lstrip(".")
    yield Import(len(source) - len(module), module, tuple(_listed(words[at + 1 :])))


def _listed(words: list[str]) -> Iterator[str]:
    """Yield the names of ``a.b, (c as d)``, without what they are called here."""
    for comma, group in itertools.groupby(words, key=lambda word: word in (",", "(", ")")):
        if not comma:
            yield "".join(itertools.takewhile(lambda word: word != "as", group))
