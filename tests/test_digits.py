"""The embedded default is small, honest about its splits, and good enough for accuracy to mean something."""

from importlib.resources import files

import numpy as np
import pytest
import torch

from lampq_rt import digits

SPLITS = ("train", "calibration", "test")


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with files("lampq_rt.digits").joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as npz:
        return dict(npz)


def test_file_is_below_one_megabyte():
    folder = files("lampq_rt.digits")
    assert len(folder.joinpath("digits.npz").read_bytes()) < 1_000_000
    assert "CC BY 4.0" in folder.joinpath("LICENSE.txt").read_text()


def test_splits_are_disjoint_and_cover_all_images(arrays):
    index = np.concatenate([arrays[f"split.{name}"] for name in SPLITS])
    assert sorted(index) == list(range(len(arrays["images"])))
    for name in SPLITS:  # every digit in each part, about equally often
        counts = np.bincount(arrays["labels"][arrays[f"split.{name}"]], minlength=10)
        assert counts.min() >= 0.9 * counts.mean() - 1


def test_no_image_is_twice_in_the_file(arrays):
    assert len(np.unique(arrays["images"].reshape(len(arrays["images"]), -1), axis=0)) == len(arrays["images"])


@pytest.mark.parametrize("split", SPLITS)
def test_images_come_normalised(split):
    images, labels = digits.load_digits(split)
    assert images.shape == (len(labels), 1, 8, 8)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert abs(images.mean()) < 0.05 and abs(images.std() - 1) < 0.05


def test_unknown_split_names_those_there_are():
    with pytest.raises(ValueError, match="'validation'.*train, calibration, test"):
        digits.load_digits("validation")


def test_model_is_accurate_on_images_it_never_saw():
    model = digits.load_digits_model()
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    images, labels = digits.load_digits("test")
    with torch.inference_mode():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert len(labels) >= 500 and accuracy >= 0.97


def test_widths_are_multiples_of_64():
    model = digits.load_digits_model()
    weights = {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert len(weights) == 4 * len(model.blocks) > 0  # qkv, proj, fc1 and fc2 of every block
    for name, weight in weights.items():
        assert all(size % 64 == 0 for size in weight.shape), name
