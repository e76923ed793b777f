"""Text of pages that benchmarks write: filled into lines, since figures of any length stand in it."""

from __future__ import annotations

import textwrap

WIDTH = 125


def paragraph(text: str) -> str:
    """Returns the text in lines."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def bullet(text: str) -> str:
    """Returns the text in lines, as one point of a list."""
    return textwrap.fill(
        text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )
