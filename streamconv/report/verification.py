"""The page about a verification: what was checked, what differs, what the model answered."""

from __future__ import annotations

from pathlib import Path

from streamconv.report.page import write_page
from streamconv.verification.report import Report


def write_report(path: Path, folder: Path, found: Report) -> None:
    """Write the page about what a verification of ``folder`` found."""
    write_page(path, "verification.html", folder=str(folder), found=found)
