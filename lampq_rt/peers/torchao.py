"""torchao: dynamic INT8 on CPUs and GPUs, dynamic fp8 a row on GPUs, both under `torch.compile`.

`force_fuse_int_mm_with_mul` spares the GPU's int8 matmul its int32 output.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from lampq_rt.peers.base import peer
from lampq_rt.variants import Contender, Job, compiled


@peer("torchao-int8", "torchao", devices=("cpu", "cuda"))
def _int8(job: Job) -> Contender:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    options = {"force_fuse_int_mm_with_mul": True} if job.device.type == "cuda" else {}
    return _contender(job, Int8DynamicActivationInt8WeightConfig(), "int8", options)


@peer("torchao-fp8", "torchao", devices=("cuda",))
def _fp8(job: Job) -> Contender:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return _contender(job, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), "float8", {})


def _contender(job: Job, config: Any, label: str, options: dict[str, Any]) -> Contender:
    from torchao.quantization import quantize_

    model = copy.deepcopy(job.original).to(job.device, torch.bfloat16)
    quantize_(model, config)
    stored = sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
    return Contender(compiled(model, job.device, **options), model, torch.bfloat16, label, stored)


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of one that stands for several (codes and steps), theirs together."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
