"""All commands together: importing the modules declares them."""

from __future__ import annotations

from streamconv.cli import batch as _batch  # noqa: F401 - declares its commands
from streamconv.cli.app import app

__all__ = ["app"]
