"""Image folders in, normalised batches out: listing, labels, decoding, and timm's own preprocessing.

    files = list_images(Path("photos"))                    # flat, or one folder per class; sorted
    preprocess = preprocessing("deit_tiny_patch16_224")    # resize, crop, mean and std as the weights were trained with
    for batch in batches(files, preprocess, batch_size=32):
        model(batch)                                       # [B, 3, 224, 224] fp32

Whatever is wrong with a file (corrupt, truncated, absurdly large, not finite after preprocessing) is a `DataError` that
names the file: an image that is silently skipped or zeroed would falsify both the calibration and the accuracy.
"""

from __future__ import annotations

import csv
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from lampq_rt.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 89_478_485
"""A larger picture is refused before it is decoded (Pillow's own limit, where it only warns): 256 MiB of pixels."""

DECODERS = 2
"""Threads that decode ahead of the model; Pillow lets go of the interpreter's lock while it decodes and resizes."""


@dataclass(frozen=True)
class Preprocessing:
    """From a picture on disk to the model's input.

    Attributes:
        config: timm's data config: input_size, mean, std, crop_pct, interpolation.
        transform: timm's evaluation transform for it, PIL image to fp32 [C, H, W].
    """

    config: dict[str, Any]
    transform: Any

    @property
    def mode(self) -> str:
        """PIL's name for the picture's channels as the model wants them."""
        return "L" if self.config["input_size"][0] == 1 else "RGB"


def list_images(folder: Path) -> list[Path]:
    """All JPEG, PNG and WebP files of `folder`, flat or one folder per class, sorted by their path.

    Raises:
        DataError: the folder does not exist, or holds no image.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"image folder {folder} {what}")
    files = [
        path
        for path in (*folder.glob("*"), *folder.glob("*/*"))
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not files:
        raise DataError(f"no JPEG, PNG or WebP image in {folder} or in the folders directly inside it")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def choose(files: Sequence[Path], count: int, seed: int) -> list[Path]:
    """`count` of the files (or all, where there are fewer), drawn by `seed`, in the order of `files`.

    Raises:
        DataError: `count` is not positive.
    """
    if count < 1:
        raise DataError(f"{count} images asked for; at least 1 is needed")
    if count >= len(files):
        return list(files)
    return [files[i] for i in sorted(random.Random(seed).sample(range(len(files)), count))]


def spread(files: Sequence[Path], limit: int | None) -> list[Path]:
    """At most `limit` of the files, evenly spaced, so that a folder sorted by class keeps all its classes.

    Raises:
        DataError: `limit` is not positive.
    """
    if limit is None or limit >= len(files):
        return list(files)
    if limit < 1:
        raise DataError(f"{limit} images asked for; at least 1 is needed")
    return [files[i * len(files) // limit] for i in range(limit)]


def preprocessing(model_name: str) -> Preprocessing:
    """timm's evaluation preprocessing for the weights that go by `model_name`.

    Raises:
        DataError: the model does not take pictures of one or three channels.
    """
    pretrained = timm.get_pretrained_cfg(model_name)
    config = resolve_data_config(pretrained_cfg=pretrained.to_dict() if pretrained else None)
    if config["input_size"][0] not in (1, 3):
        raise DataError(f"{model_name} takes {config['input_size'][0]} channels; image files give 1 or 3")
    return Preprocessing(config, create_transform(**config, is_training=False))


def load_image(path: Path, preprocess: Preprocessing) -> Tensor:
    """One picture as the model's input, fp32 [C, H, W].

    Raises:
        DataError: unreadable, corrupt, truncated, too large, of a depth that cannot be kept, or not finite.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{path}: {width}x{height} pixels; refused as a decompression bomb")
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                raise DataError(f"{path}: pixels of mode {picture.mode!r}; save the picture with 8 bits per channel")
            tensor = preprocess.transform(picture.convert(preprocess.mode))
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels; refused as a decompression bomb") from None
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        raise DataError(f"{path}: not a readable image ({type(error).__name__}: {str(error)[:120]})") from None
    check_finite(tensor, str(path))
    return tensor


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse NaN and infinities.

    Raises:
        DataError: the message starts with `name`.
    """
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")


def batches(files: Sequence[Path], preprocess: Preprocessing, batch_size: int) -> Iterator[Tensor]:
    """Batches [B, C, H, W] fp32 in the order of `files`; threads decode ahead of the model that works on them.

    Raises:
        DataError: as `load_image`.
    """
    upcoming = iter(files)
    with ThreadPoolExecutor(DECODERS) as pool:
        waiting = deque(pool.submit(load_image, path, preprocess) for path in islice(upcoming, 2 * batch_size))
        try:
            while waiting:
                group: list[Tensor] = []
                while waiting and len(group) < batch_size:
                    group.append(waiting.popleft().result())
                    waiting.extend(pool.submit(load_image, path, preprocess) for path in islice(upcoming, 1))
                yield torch.stack(group)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def load_images(files: Sequence[Path], preprocess: Preprocessing) -> Tensor:
    """All the files as one tensor [n, C, H, W] fp32, for calibration.

    Raises:
        DataError: as `load_image`, or there is no file.
    """
    if not files:
        raise DataError("no image to load")
    return torch.cat(list(batches(files, preprocess, batch_size=16)))


def read_labels(table: Path, folder: Path, files: Sequence[Path], classes: int) -> dict[Path, int]:
    """The class of each image, from a CSV file with the columns `file` (relative to `folder`) and `label` (0-based).

    Args:
        table: the CSV file; UTF-8, other columns are ignored.
        folder: what the names in `file` are relative to.
        files: every image of the folder (`list_images`), also those that will not be used.
        classes: number of the model's outputs.

    Raises:
        DataError: names the wrong row (unknown file, label that is no class, second label), or an unlabelled image.
    """
    by_name = {path.relative_to(folder).as_posix(): path for path in files}
    labels: dict[Path, int] = {}
    for number, row in _rows(table):
        name = (row["file"] or "").strip().replace("\\", "/")
        path = by_name.get(name)
        if path is None:
            raise DataError(f"{table}, row {number}: {name!r} is not an image in {folder}")
        if path in labels:
            raise DataError(f"{table}, row {number}: {name!r} has a label already")
        labels[path] = _label(row["label"], classes, f"{table}, row {number}")
    missing = next((name for name, path in by_name.items() if path not in labels), None)
    if missing is not None:
        raise DataError(f"{table}: no label for {missing!r}; {len(labels)} of {len(files)} images have one")
    return labels


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Rows of a labels file with their line numbers."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"file", "label"} <= set(columns):
                raise DataError(f"{table}: columns {', '.join(columns) or 'none'}; file and label are needed")
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise DataError(f"labels file {table}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a CSV file in UTF-8 ({error})") from None


def _label(text: str | None, classes: int, where: str) -> int:
    try:
        label = int((text or "").strip())
    except ValueError:
        raise DataError(f"{where}: label {text!r} is not an integer") from None
    if not 0 <= label < classes:
        raise DataError(f"{where}: label {label}; this model has the classes 0 to {classes - 1}")
    return label
