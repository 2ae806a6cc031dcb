"""Tables that a command writes into a page which people write, too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def put_between(out: Path, name: str, lines: Iterable[str], title: str = "Results") -> None:
    """Replace what lies between the markers `<!-- name:begin -->` and end, or add both behind the end of the page."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = out.read_text() if out.is_file() else f"# {title}\n"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    before, rest = text.split(begin, 1)
    out.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1])
