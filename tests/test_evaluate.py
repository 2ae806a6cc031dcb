"""Figures of `evaluate` against ones computed by hand, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from lampq_rt.errors import DataError, ModelError
from lampq_rt.evaluate import evaluate, kl_divergence


class Fixed(nn.Module):
    """Answers with the logits that an image carries in one of its channels."""

    def __init__(self, channel):
        super().__init__()
        self.channel = channel

    def forward(self, images):
        return images[:, self.channel].flatten(1)


def images_of(*logits):
    """One image per row of each channel's logits: [n, channels, 1, classes]."""
    return torch.stack([torch.tensor(rows, dtype=torch.float32) for rows in logits], 1).unsqueeze(2)


TEACHER = [[4.0, 0, 0, 0, 0, 0], [0, 4.0, 3, 0, 0, 0], [0, 0, 4.0, 0, 0, 0], [9.0, 8, 7, 6, 5, 0]]
STUDENT = [[4.0, 0, 0, 0, 0, 0], [0, 3.0, 4, 0, 0, 0], [0, 0, 5.0, 0, 0, 0], [9.0, 8, 7, 6, 5, 0]]
LABELS = torch.tensor([0, 1, 2, 5])


def test_figures_by_hand():
    images = images_of(TEACHER, STUDENT)
    found = evaluate(Fixed(1), Fixed(0), images.split(3), LABELS)
    assert (found.images, found.top1, found.fp32_top1, found.agreement) == (4, 50.0, 75.0, 75.0)
    assert (found.top5, found.fp32_top5) == (75.0, 75.0)  # the last image's class is sixth
    kl = 0.0
    for teacher, student in zip(TEACHER, STUDENT, strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (teacher, student))
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 4
    assert found.kl == pytest.approx(kl, rel=1e-12)
    assert found.seconds >= 0
    keys = ["images", "top1", "top5", "fp32_top1", "fp32_top5", "agreement", "kl", "seconds"]
    assert list(found.to_json()) == keys


def test_every_model_gets_images_on_its_own_device():
    class Elsewhere(Fixed):
        def __init__(self, channel):
            super().__init__(channel)
            self.register_buffer("here", torch.zeros(1, device="meta"))

        def forward(self, images):
            assert images.device.type == "meta"
            return super().forward(pictures)

    pictures = images_of(TEACHER, STUDENT)
    found = evaluate(Elsewhere(1), Fixed(0), [pictures], LABELS)
    assert (found.top1, found.fp32_top1, found.agreement) == (50.0, 75.0, 75.0)
    assert evaluate(Fixed(1), Elsewhere(0), [pictures]).agreement == 75.0


def test_the_direction_of_kl():
    sharp, flat = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(kl_divergence(sharp, flat)) != pytest.approx(float(kl_divergence(flat, sharp)))
    p = 1 / (1 + math.exp(-4))
    assert float(kl_divergence(sharp, flat)) == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))


def test_without_labels_and_without_original():
    images = images_of(TEACHER, STUDENT)
    unlabelled = evaluate(Fixed(1), Fixed(0), [images])
    assert unlabelled.top1 is unlabelled.fp32_top5 is None and unlabelled.agreement == 75.0
    alone = evaluate(Fixed(1), None, [images], LABELS)
    assert alone.top1 == 50.0 and alone.agreement is alone.kl is alone.fp32_top1 is None


def test_the_original_itself():
    model = Fixed(0)
    found = evaluate(model, model, [images_of(TEACHER, STUDENT)], LABELS)
    assert (found.top1, found.fp32_top1, found.agreement, found.kl) == (75.0, 75.0, 100.0, 0.0)


def test_fewer_than_five_classes():
    found = evaluate(Fixed(0), None, [images_of([[1.0, 0], [1, 0]])], torch.tensor([0, 1]))
    assert (found.top1, found.top5) == (50.0, 100.0)


def test_what_is_refused():
    images = images_of(TEACHER, STUDENT)
    with pytest.raises(DataError, match="no images"):
        evaluate(Fixed(0), None, [], LABELS)
    with pytest.raises(DataError, match="2 labels for more than"):
        evaluate(Fixed(0), None, images.split(1), LABELS[:2])
    bad = images.clone()
    bad[2, 1, 0, 3] = float("nan")
    with pytest.raises(ModelError, match="quantised model gives logits that are NaN or infinite, first for image 2"):
        evaluate(Fixed(1), Fixed(0), bad.split(2), LABELS)
    with pytest.raises(ModelError, match="not the same classifier"):
        evaluate(nn.Sequential(Fixed(0), nn.Linear(6, 4)), Fixed(0), [images])
    with pytest.raises(ModelError, match="has it a classifier"):
        evaluate(nn.Identity(), None, [images])
