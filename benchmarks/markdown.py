"""Tables that a command writes into a page which people write, too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lampq_rt import files
from lampq_rt.errors import DataError


def put_between(out: Path, name: str, lines: Iterable[str], title: str = "Results") -> None:
    """Replace what lies between the markers `<!-- name:begin -->` and end, or add both behind the end of the page.

    Raises:
        DataError: the first marker without the second, or the page cannot be written; it is then as it was.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = out.read_text() if out.is_file() else f"# {title}\n"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    before, rest = text.split(begin, 1)
    if end not in rest:
        raise DataError(f"{out}: {begin} without {end} after it")
    body = "\n".join([begin, *lines, end])
    files.write_file(out, (before + body + rest.split(end, 1)[1]).encode(), what="results", error=DataError)
