"""ONNX Runtime on CPUs: static INT8 (QDQ) and dynamic INT8.

As its guide says for x86 processors with VNNI: u8 activations, s8 weights a channel, the model prepared by
`quant_pre_process` first, all graph optimisations, and the batch size fixed when the session is made. Static INT8
quantises matmuls and the convolution: with every op, which is the default, it is no faster and ViT-Tiny is lost (0.1 %
right). Its steps are percentiles, which lose less than largest values. Dynamic INT8 leaves the convolution and the
matmuls of attention in fp32: quantised they were slower.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.peers.base import kept, peer
from lampq_rt.variants import Contender, Job

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
PERCENTILE = 99.999
OPSET = 17  # the first with LayerNormalization, and the last that PyTorch's tracing exporter was made for


@peer("ort-static", "onnxruntime", "onnx")
def _static(job: Job) -> Contender:
    def make(folder: Path) -> None:
        from onnxruntime import quantization

        class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left: Iterator[dict[str, Any]] = ({INPUT: i[None].numpy()} for i in job.calibration)

            def get_next(self) -> dict[str, Any] | None:
                return next(self.left, None)

        prepared = _exported(job.original, job.calibration[:1], folder)
        with redirect_stdout(sys.stderr):  # it prints how far it is
            quantization.quantize_static(
                prepared,
                folder / "model.onnx",
                Images(),
                quant_format=quantization.QuantFormat.QDQ,
                calibrate_method=quantization.CalibrationMethod.Percentile,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                extra_options={"CalibPercentile": PERCENTILE},
            )
        prepared.unlink()

    return _contender(kept(job, "ort-static", make) / "model.onnx")


@peer("ort-dynamic", "onnxruntime", "onnx")
def _dynamic(job: Job) -> Contender:
    def make(folder: Path) -> None:
        from onnxruntime import quantization

        prepared = _exported(job.original, job.calibration[:1], folder)
        quantization.quantize_dynamic(
            prepared,
            folder / "model.onnx",
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        prepared.unlink()

    return _contender(kept(job, "ort-dynamic", make) / "model.onnx")


def _exported(original: nn.Module, example: Tensor, folder: Path) -> Path:
    """The model in fp32 as ONNX, prepared for quantisation."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared = folder / "plain.onnx", folder / "prepared.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's about Python values, which do not change here
        torch.onnx.export(
            copy.deepcopy(original),
            (example,),
            str(plain),
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
        )
    quant_pre_process(str(plain), str(prepared))
    plain.unlink()
    return prepared


def _contender(file: Path) -> Contender:
    return Contender(_runner(file), None, torch.float32, "int8", stored_bytes=file.stat().st_size)


def _runner(file: Path) -> Callable[[Tensor], Tensor]:
    """Makes a session for the batch size that it is called with, and another when another comes."""
    import onnxruntime

    session: Any = None
    batch = 0

    def run(images: Tensor) -> Tensor:
        nonlocal session, batch
        if len(images) != batch:
            batch = len(images)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            options.add_free_dimension_override_by_name(BATCH, batch)
            options.add_session_config_entry("session.force_spinning_stop", "1")  # or it slows the next variant's turn
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run
