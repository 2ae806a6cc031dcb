"""Files that are either whole or not there: write to a temporary sibling, flush, rename.

Everything that goes wrong (disk full, no permission, a folder in the way) is raised as the error class that the caller
names, in one line with the path and the cause. What lay at the path before is then still there, and nothing temporary
is left beside it. JSON that comes from outside is read here too, strictly.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lampq_rt.errors import LampqError, StorageError

Content = bytes | bytearray | Callable[[BinaryIO], object]
"""What a file is to hold: the bytes, or a function that writes them to an open binary file."""


def write_file(path: str | Path, content: Content, *, what: str, error: type[LampqError]) -> None:
    """Put a file at `path`, replacing one that is there. A symbolic link stays one: its target is replaced.

    Args:
        path: where; its folder must exist.
        content: see `Content`.
        what: what the file is, for the message ("checkpoint").
        error: class of the error to raise.

    Raises:
        error: the file could not be written.
    """
    temporary: str | None = None
    try:
        target = os.path.realpath(path)
        _refuse_irregular(target)
        temporary = _sibling(target)
        _write(temporary, content)
        os.replace(temporary, target)
        temporary = None
        _flush_folder(os.path.dirname(target))
    except (OSError, ValueError) as cause:
        raise error(f"cannot write {what} {shown(path)}: {reason(cause)}") from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def write_folder(path: str | Path, files: Mapping[str, Content], *, what: str, error: type[LampqError]) -> None:
    """Put a folder of exactly these files at `path`, replacing one that holds nothing but files of these names.

    The new folder is written beside the old one; then two renames swap them. A crash between the two leaves the old one
    under its temporary name (".lampq-….old"), whole.

    Args:
        path: where; its parent must exist.
        files: content by name.
        what: what the folder is, for the message ("plan").
        error: class of the error to raise.

    Raises:
        error: the folder could not be written, or what lies at `path` is something else and was left alone.
    """
    temporary: str | None = None
    try:
        target = os.path.realpath(path)
        occupied = os.path.lexists(target)
        if occupied:
            _refuse_foreign(target, files)
        temporary = _sibling(target)
        os.mkdir(temporary)
        for name, content in files.items():
            _write(os.path.join(temporary, name), content)
        _flush_folder(temporary)
        _swap(temporary, target, occupied)
        temporary = None
        _flush_folder(os.path.dirname(target))
    except (OSError, ValueError) as cause:
        raise error(f"cannot write {what} {shown(path)}: {reason(cause)}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_place(path: str | Path, *, what: str, error: type[LampqError], names: Collection[str] | None = None) -> None:
    """Refuse now what `write_file` or `write_folder` would refuse later, when the work that fills it is done.

    An empty file is made beside it and removed again: permissions alone do not say whether a file can be written (root,
    file systems that are read-only or have no files of their own).

    Args:
        path: where it will be written; left as it is.
        what: what will be written, for the message ("plan").
        error: class of the error to raise.
        names: of the files in it where it is to be a folder; None for a file.

    Raises:
        error: it could not be written there.
    """
    try:
        target = os.path.realpath(path)
        if names is None:
            _refuse_irregular(target)
        elif os.path.lexists(target):
            _refuse_foreign(target, names)
        temporary = _sibling(target)
        try:
            _write(temporary, b"")
        finally:
            with suppress(OSError):
                os.unlink(temporary)
    except (OSError, ValueError) as cause:
        raise error(f"cannot write {what} {shown(path)}: {reason(cause)}") from None


def read_file(path: str | Path, *, what: str, error: type[LampqError], limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        error: there is no such file, it is a folder or a device, it cannot be read, or it is larger.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a pipe would wait for its writer
            raise OSError(0, "it is a folder" if os.path.isdir(path) else "it is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise OSError(0, f"it has {size} bytes; at most {limit} are allowed")
            return file.read()
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {what} {shown(path)}: {reason(cause)}") from None
    except MemoryError:
        raise error(f"cannot read {what} {shown(path)}: it does not fit into memory") from None


@contextmanager
def in_temporary_folder() -> Iterator[None]:
    """Around what writes to the temporary folder.

    Raises:
        StorageError: it cannot be written there.
    """
    try:
        yield
    except OSError as cause:
        folder = shown(tempfile.tempdir or "(TMPDIR)")
        raise StorageError(
            f"cannot write to the temporary folder {folder}: {reason(cause)}; calibration keeps samples and the "
            "rewritten model there, some GB for a large model; set TMPDIR to a folder with room"
        ) from None


def reason(cause: Exception) -> str:
    """The cause in a few words and one line, without a path."""
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or type(cause).__name__
    return " ".join(text.split())


def shown(path: str | Path) -> str:
    """The path as an error message shows it: on one line, whatever is in it."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _sibling(target: str) -> str:
    """A new name in the folder of `target`; renaming within one folder cannot cross file systems."""
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(0, f"there is no folder {shown(folder)}")
    return os.path.join(folder, f".lampq-{secrets.token_hex(6)}.tmp")


def _write(path: str, content: Content) -> None:
    """Write a file that must not exist yet, through to the disk."""
    with open(path, "xb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: str) -> None:
    """Make a rename durable. Not every file system can do this, and by now the new file stands: failing is no error."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_irregular(target: str) -> None:
    """Raise OSError where something else than a regular file lies at `target`."""
    if os.path.isdir(target):
        raise IsADirectoryError(0, "it is a folder")
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(0, "it is not a regular file")


def _refuse_foreign(target: str, names: Collection[str]) -> None:
    """Raise OSError unless `target` is a folder with no other content than files of these names."""
    if not os.path.isdir(target):
        raise FileExistsError(0, "a file of this name exists; a folder is to be written")
    for entry in sorted(os.scandir(target), key=lambda e: e.name):
        if entry.name not in names or not entry.is_file():
            raise FileExistsError(0, f"this folder holds other things ({shown(entry.name)}) and was left as it is")


def _swap(new: str, target: str, occupied: bool) -> None:
    """Rename `new` to `target`; where that is occupied, move the old folder aside first and remove it last."""
    if not occupied:
        os.rename(new, target)
        return
    aside = f"{new.removesuffix('.tmp')}.old"
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def parse_json(data: bytes | str, *, where: str, error: type[LampqError]) -> Any:
    """The value that JSON text stands for, read strictly: no NaN, no Infinity, no key twice in one object.

    Raises:
        error: the text is no such JSON, or not UTF-8; the message starts with `where`.
    """
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: not valid JSON ({reason(cause)})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {twice!r:.80} stands there twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")
