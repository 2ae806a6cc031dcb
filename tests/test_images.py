"""Image folders: what is listed, what is refused, and that preprocessing is timm's own."""

import io
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from lampq_rt import images
from lampq_rt.errors import DataError


def picture(seed=0, size=(48, 40), mode="RGB"):
    noise = torch.randint(
        0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(noise.numpy(), "RGB").convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes with three formats, and things that are no images."""
    for name, seed in (("cat/b.png", 1), ("cat/a.jpg", 2), ("dog/c.webp", 3)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        picture(seed).save(path)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._a.jpg").write_bytes(b"resource fork")
    return tmp_path


@pytest.fixture(scope="module")
def preprocess():
    return images.preprocessing("test_vit")


def names(files, folder):
    return [path.relative_to(folder).as_posix() for path in files]


def test_lists_classes_in_order(folder):
    assert names(images.list_images(folder), folder) == ["cat/a.jpg", "cat/b.png", "dog/c.webp"]


def test_lists_a_flat_folder_whatever_the_case_of_the_suffix(tmp_path):
    for name in ("z.JPEG", "y.PNG"):
        picture().save(tmp_path / name)
    assert names(images.list_images(tmp_path), tmp_path) == ["y.PNG", "z.JPEG"]


def test_folder_that_is_missing_empty_or_a_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        images.list_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no JPEG, PNG or WebP image"):
        images.list_images(tmp_path)
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        images.list_images(tmp_path / "file.png")


def test_choice_depends_on_the_seed_alone():
    files = [Path(f"{i:03}.png") for i in range(100)]
    first = images.choose(files, 10, seed=3)
    assert first == images.choose(files, 10, seed=3) != images.choose(files, 10, seed=4)
    assert first == sorted(first) and len(set(first)) == 10
    assert images.choose(files[:5], 32, seed=0) == files[:5]
    with pytest.raises(DataError, match="at least 1"):
        images.choose(files, 0, seed=0)


def test_limit_is_spread_over_the_list():
    files = [Path(str(i)) for i in range(10)]
    assert images.spread(files, 5) == files[::2]
    assert images.spread(files, None) == images.spread(files, 50) == files
    with pytest.raises(DataError, match="at least 1"):
        images.spread(files, 0)


def test_preprocessing_is_timms(folder, preprocess):
    model = timm.create_model("test_vit")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    path = folder / "cat" / "b.png"
    assert torch.equal(images.load_image(path, preprocess), transform(Image.open(path).convert("RGB")))


@pytest.mark.parametrize(
    ("model", "mean", "crop"),
    [("vit_tiny_patch16_224", (0.5, 0.5, 0.5), 0.9), ("deit_tiny_patch16_224", (0.485, 0.456, 0.406), 0.9)],
)
def test_config_is_that_of_the_named_weights(model, mean, crop):
    config = images.preprocessing(model).config
    assert (config["mean"], config["crop_pct"], config["interpolation"]) == (mean, crop, "bicubic")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_common_mode_becomes_rgb(tmp_path, preprocess, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    picture(mode=mode).save(path)
    assert images.load_image(path, preprocess).shape == (3, 160, 160)


def test_batches_keep_order_and_cover_all(tmp_path, preprocess):
    for i in range(7):
        picture(i).save(tmp_path / f"{i}.png")
    files = images.list_images(tmp_path)
    batches = list(images.batches(files, preprocess, 3))
    assert [len(b) for b in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), torch.stack([images.load_image(f, preprocess) for f in files]))
    assert torch.equal(images.load_images(files, preprocess), torch.cat(batches))


def test_batches_can_be_left_early(tmp_path, preprocess, monkeypatch):
    """Images that wait for a decoder then are not decoded any more."""
    begun, left, load = [], threading.Event(), images.load_image

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            left.set()
            super().shutdown(wait=wait)

    def decode(path, chosen):
        begun.append(path.name)
        assert len(begun) < 3 or left.wait(60)
        return load(path, chosen)

    for name, value in (("load_image", decode), ("ThreadPoolExecutor", Pool), ("DECODERS", 1)):
        monkeypatch.setattr(images, name, value)
    for i in range(6):
        picture(i).save(tmp_path / f"{i}.png")
    stream = images.batches(images.list_images(tmp_path), preprocess, 2)
    assert next(stream).shape == (2, 3, 160, 160)
    stream.close()
    assert begun in (["0.png", "1.png"], ["0.png", "1.png", "2.png"])  # the third may have been under way
    assert list(stream) == []


def jpeg():
    buffer = io.BytesIO()
    picture(size=(200, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def bomb():
    """A PNG whose header claims 60000 x 60000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("truncated.jpg", jpeg()[:3000], "not a readable image"),
        ("noise.jpg", b"\xff\xd8\xff\xe0 nothing more", "not a readable image"),
        ("text.png", b"hello", "not a readable image"),
        ("empty.webp", b"", "not a readable image"),
        ("bomb.png", bomb(), "decompression bomb"),
    ],
)
def test_bad_files_are_named(tmp_path, preprocess, name, content, why):
    picture().save(tmp_path / "good.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=why) as error:
        list(images.batches(images.list_images(tmp_path), preprocess, 8))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Image size")
def test_large_picture_that_pillow_only_warns_of(tmp_path, preprocess):
    data = bytearray(bomb())
    data[16:24] = struct.pack(">II", 10000, 10000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "large.png").write_bytes(data)
    with pytest.raises(DataError, match=r"large\.png.*decompression bomb"):
        images.load_image(tmp_path / "large.png", preprocess)


def test_sixteen_bit_grey_is_refused_rather_than_clipped(tmp_path, preprocess):
    Image.new("I;16", (32, 32), 40000).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png.*8 bits"):
        images.load_image(tmp_path / "deep.png", preprocess)


def test_values_that_are_not_finite_are_refused(folder, preprocess):
    broken = images.Preprocessing({**preprocess.config}, lambda image: preprocess.transform(image) * float("nan"))
    with pytest.raises(DataError, match=r"b\.png: \d+ of \d+ values are NaN or infinite"):
        images.load_image(folder / "cat" / "b.png", broken)
    with pytest.raises(DataError, match="batch 3: 1 of 4"):
        images.check_finite(torch.tensor([0.0, 1.0, float("inf"), 2.0]), "batch 3")


def test_labels(folder):
    files = images.list_images(folder)
    table = folder / "labels.csv"
    table.write_text("\ufefffile,label,name\ncat/a.jpg,0,cat\ncat/b.png, 0 ,cat\ndog/c.webp,9,dog\n", encoding="utf-8")
    labels = images.read_labels(table, folder, files, classes=10)
    assert [labels[path] for path in files] == [0, 0, 9]


GOOD = "file,label\ncat/a.jpg,0\ncat/b.png,1\ndog/c.webp,2\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD + "cat/zebra.png,1\n", r"row 5: 'cat/zebra.png' is not an image"),
        (GOOD.replace(",1", ",10"), r"row 3: label 10; this model has the classes 0 to 9"),
        (GOOD.replace(",1", ",-1"), r"row 3: label -1"),
        (GOOD.replace(",1", ",cat"), r"row 3: label 'cat' is not an integer"),
        (GOOD.replace("cat/b.png,1", "cat/b.png"), r"row 3: label None is not an integer"),
        (GOOD + "cat/a.jpg,0\n", r"row 5: 'cat/a.jpg' has a label already"),
        ("file,label\ncat/a.jpg,0\n", r"no label for 'cat/b.png'; 1 of 3 images"),
        ("path,class\ncat/a.jpg,0\n", r"columns path, class; file and label are needed"),
        ("", r"columns none"),
    ],
)
def test_wrong_labels_name_the_row(folder, text, why):
    table = folder / "labels.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=why):
        images.read_labels(table, folder, images.list_images(folder), classes=10)


def test_labels_file_that_cannot_be_read(folder):
    files = images.list_images(folder)
    with pytest.raises(DataError, match="No such file"):
        images.read_labels(folder / "none.csv", folder, files, classes=10)
    (folder / "binary.csv").write_bytes(b"file,label\n\xff\xfe\x00,1\n")
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        images.read_labels(folder / "binary.csv", folder, files, classes=10)
