"""Text of strangers as people may see it."""

from __future__ import annotations


def shown(text: str) -> str:
    """Return ``text`` as one line of printable characters, all others escaped as in Python.

    >>> print(shown("a\\x1b[31m\\n\\u202eb"))
    a\\x1b[31m\\n\\u202eb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def clipped(text: str, most: int) -> str:
    """Return ``text`` in at most ``most`` characters: its beginning, and how many more there are.

    >>> print(clipped("a" * 100, 40))
    aaaaaaaaaaaaaaa… (85 more characters)
    """
    if len(text) <= most:
        return text
    kept = most - len(f"… ({len(text)} more characters)")
    return f"{text[:kept]}… ({len(text) - kept} more characters)"


def _escaped(character: str) -> str:
    return repr(character)[1:-1]
