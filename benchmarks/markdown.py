"""Tables that a benchmark keeps up to date between two markers of a Markdown file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def replace_between(path: Path, begin: str, end: str, lines: Iterable[str]) -> None:
    """Put `lines` between the markers of `path`, or behind its end where it has none."""
    text = path.read_text() if path.is_file() else "# Results\n"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    before, rest = text.split(begin, 1)
    path.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1])
