"""What an input format is: the questions that are asked of each, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from streamconv.ir.source import Checkpoint, SourceFile


class Format(Protocol):
    """An input format: a module with these names. ``path`` is the folder of the weights, or a file.

    ``NAME`` goes into plans and manifests. ``FINISHED`` says that such weights are a model that nobody
    trains any more: among the folders of a run it is an output, not a checkpoint. ``SEVERAL`` says that
    the names of its tensors may tell several models apart.
    """

    NAME: str
    FINISHED: bool
    SEVERAL: bool

    def detect(self, path: Path, /) -> str | None:
        """Return why ``path`` looks like this format, by the names of files alone, or None.

        Raises :class:`BadInputError` for what has such a name and is not a file.
        """
        ...

    def side_dir(self, path: Path, /) -> Path | None:
        """Return the folder with config and tokenizer, where it is there."""
        ...

    def index_file(self, path: Path, /) -> Path | None:
        """Return the one file that describes all others; None in a format without one."""
        ...

    def identify(self, path: Path, /) -> tuple[SourceFile, ...]:
        """Return the files of weights with what identifies them; cheap: nothing is parsed.

        They are those of what :meth:`read` returns. Raises :class:`BadInputError` for missing ones.
        """
        ...

    def read(self, path: Path, /) -> Checkpoint:
        """Return the metadata of the checkpoint; no weight is read.

        Raises :class:`BadInputError` for a damaged or incomplete checkpoint,
        :class:`UnsafeInputError` for a hostile one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Location:
    """Where a model of a known format lies: a folder, or a file.

    ``notices`` say what a user should know of why it is this one.
    """

    path: Path
    kind: Format
    notices: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """Return the folder that the paths of its files are relative to."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def format(self) -> str:
        """Return the name of the format."""
        return self.kind.NAME

    @property
    def side_dir(self) -> Path | None:
        """Return the folder with config and tokenizer, where the checkpoint has one."""
        return self.kind.side_dir(self.path)

    @property
    def index_nbytes(self) -> int:
        """Return the size of the one file that describes all others, 0 in a format without one."""
        path = self.kind.index_file(self.path)
        return path.stat().st_size if path is not None and path.is_file() else 0

    def read(self) -> Checkpoint:
        """Return the metadata of the checkpoint; no weight is read."""
        found = self.kind.read(self.path)
        return replace(found, notices=(*self.notices, *found.notices)) if self.notices else found

    def identify(self) -> tuple[SourceFile, ...]:
        """Return the source files with their hashes, without reading what they hold."""
        return self.kind.identify(self.path)
