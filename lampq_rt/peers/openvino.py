"""OpenVINO on CPUs: in bf16, and in static INT8 by NNCF.

NNCF as its guide says for Transformers: `ModelType.TRANSFORMER` (which smooths activations into weights first), preset
mixed, 300 images. OpenVINO for latency: shapes fixed, hint LATENCY, as many threads as PyTorch has, and bf16 for what
is not integer, which is faster than fp32 wherever the processor can do it.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.peers.base import kept, peer
from lampq_rt.variants import Contender, Job

NNCF_IMAGES = 300


@peer("openvino-bf16", "openvino")
def _bf16(job: Job) -> Contender:
    def make(folder: Path) -> None:
        import openvino

        openvino.save_model(_converted(job.original, job.calibration[:1]), folder / "model.xml")  # stores halves

    return _contender(kept(job, "openvino-bf16", make), "bfloat16")


@peer("openvino-int8", "openvino", "nncf", calibration_images=NNCF_IMAGES)
def _int8(job: Job) -> Contender:
    def make(folder: Path) -> None:
        import nncf
        import openvino

        nncf.set_log_level("ERROR")
        with redirect_stdout(sys.stderr):  # its progress bars
            quantised = nncf.quantize(
                _converted(job.original, job.calibration[:1]),
                nncf.Dataset([image[None].numpy() for image in job.calibration]),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(job.calibration),
            )
        openvino.save_model(quantised, folder / "model.xml", compress_to_fp16=False)

    return _contender(kept(job, "openvino-int8", make), "int8")


def _converted(original: nn.Module, example: Tensor) -> Any:
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's about Python values, which do not change here
        return openvino.convert_model(copy.deepcopy(original), example_input=example)


def _contender(folder: Path, label: str) -> Contender:
    weights = (folder / "model.bin").stat().st_size
    return Contender(_runner(folder / "model.xml"), None, torch.float32, label, stored_bytes=weights)


def _runner(file: Path) -> Callable[[Tensor], Tensor]:
    """Compiles for the batch size that it is called with, and again when another comes."""
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request: Any = None
    shape: tuple[int, ...] = ()

    def run(images: Tensor) -> Tensor:
        nonlocal request, shape
        if images.shape != shape:
            shape = tuple(images.shape)
            model.reshape(list(shape))
            request = core.compile_model(model, "CPU", settings).create_infer_request()
        (logits,) = request.infer([images.numpy()], share_inputs=True).values()
        return torch.from_numpy(logits)

    return run
