"""Puts facts into a template: a page that needs nothing beside itself."""

from __future__ import annotations

import json
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from streamconv._version import __version__
from streamconv.errors import shown
from streamconv.files import askedfile
from streamconv.files.names import shown_all
from streamconv.units import format_duration, format_size

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"size": format_size, "duration": format_duration, "when": _when}
    return made


def _visible(value: object) -> object:
    """Return a text of a checkpoint as people may see it; markup and numbers as they are."""
    return shown(str(value)) if type(value) is str or isinstance(value, Path) else value


def _when(seconds: float | None) -> str:
    if not seconds:
        return ""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"  # noqa: DTZ006 - local, for people


def embedded(data: object) -> Markup:
    """Return data as JSON that may stand in a script element: no ``<`` can end it."""
    text = json.dumps(shown_all(data), ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # noqa: S704 - see above


def drawn(svg: str) -> Markup:
    """Return a chart as markup; the charts escape what is not theirs."""
    return Markup(svg)  # noqa: S704 - see above


def write_page(path: Path, template: str, **facts: Any) -> None:
    """Render a template into ``path``, which appears whole and replaces nothing but such a page."""
    page = _environment().get_template(template)
    with askedfile.written(
        askedfile.checked(path, askedfile.PAGE), askedfile.PAGE, errors="backslashreplace"
    ) as out:
        # Piece by piece: the page of a model of 50,000 tensors is some megabytes.
        for piece in page.generate(version=__version__, **facts):
            out.write(piece)
