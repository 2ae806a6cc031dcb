"""Which linears a model launches on a GPU, and tuning them: `lampq tune`, and `compile(…, tune=True)`.

The launches are read from a forward pass of the integer model on the meta device, which computes nothing: the list
covers patch embedding and head, follows the model's own fusions, and needs neither weights nor a GPU.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lampq_rt import backends
from lampq_rt.errors import BackendError, FormatError
from lampq_rt.plan import SiteParams
from lampq_rt.runner import BUCKETS, l2_bytes, micro_batch_for
from lampq_rt.sites import Site

if TYPE_CHECKING:
    from lampq_rt.kernels.gpu.work import LinearWork

logger = logging.getLogger(__name__)

FORMATS: dict[str, tuple[int, int]] = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
"""Widths of weights and input activations, by name: the containers that linears exist for."""


def check_format(name: str) -> str:
    """`name`, if it is one of `FORMATS`.

    Raises:
        FormatError: it is not; the message lists them.
    """
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}; allowed: {', '.join(FORMATS)}")
    return name


def gpu_architecture() -> str:
    """Architecture of the present GPU, as tables are named: "sm90".

    Raises:
        BackendError: there is none, or none that the kernels run on.
    """
    if not torch.cuda.is_available():
        raise BackendError("tuning times kernels on a CUDA GPU, and PyTorch finds none on this machine")
    backends.resolve("cuda")
    from lampq_rt.kernels.gpu.impl import architecture

    return architecture(torch.cuda.current_device())


def launches(
    model: nn.Module, input_size: Sequence[int], batches: Sequence[int], formats: Sequence[str] = tuple(FORMATS)
) -> list[LinearWork]:
    """Every linear that `model` launches at these batch sizes when all its sites have one of `formats`.

    Args:
        model: of a supported family, also on the meta device; its weights are not looked at.
        input_size: (C, H, W) of an image.
        batches: batch sizes.
        formats: names in `FORMATS`.

    Returns:
        One launch for each key of a tuning table, the largest first: what matters most comes first in a run that is
        stopped.

    Raises:
        ModelError: the model is of no supported family.
    """
    from lampq_rt.adapters import adapter_for

    adapter = adapter_for(model)
    description = adapter.describe(model)
    sites = description.sites
    sizes = {size for batch in batches for size in _kernel_batches(batch, description.image_bytes)}
    blank = copy.deepcopy(model).to("meta")
    found: dict[str, LinearWork] = {}
    for name in formats:
        chosen = {site.name: _stand_in(site, *FORMATS[name]) for site in sites}
        integer = adapter.integer(blank, chosen, "native")
        for size in sorted(sizes):
            for work in recorded(integer, torch.empty((size, *input_size), device="meta")):
                found.setdefault(work.key, work)
    return sorted(found.values(), key=lambda work: -work.operations)


def _kernel_batches(batch: int, image_bytes: int) -> set[int]:
    """Images that a kernel sees at once when `batch` come: whole buckets, or the GPU's micro-batches."""
    micro_batch = micro_batch_for(image_bytes, l2_bytes())
    largest = BUCKETS[-1]
    parts = {largest} if batch > largest else set()
    parts |= {next(b for b in BUCKETS if b >= batch % largest)} if batch % largest else {min(batch, largest)}
    return {min(part, micro_batch or part) for part in parts}


def recorded(function: Callable[[Tensor], Any], images: Tensor) -> list[LinearWork]:
    """The linears that `function(images)` launches, one a key."""
    from lampq_rt.kernels.gpu.work import Recorder

    with torch.inference_mode(), Recorder() as recorder:
        function(images)
    return list(recorder.works.values())


def tune_missing(function: Callable[[Tensor], Any], images: Tensor) -> None:
    """Tune the linears that `function(images)` launches and no table has; the user's own table keeps what is found.

    Args:
        function: an integer model on the GPU; called once, and not while a CUDA graph is captured.
        images: fp32 [B, C, H, W] on the GPU; tables go by the number of rows, so by B.

    Raises:
        BackendError: there is no GPU that the kernels run on.
    """
    from lampq_rt.kernels.gpu import tables, tune

    arch = gpu_architecture()
    missing = [work for work in recorded(function, images) if not tables.has(arch, work.key)]
    if missing:
        logger.info("tuning %d linears for batches of %d; this happens once", len(missing), len(images))
    for _ in tune.tune_all(missing, arch):
        pass


def _stand_in(site: Site, weight_bits: int, input_bits: int) -> SiteParams:
    """Formats of these widths with steps of one; the attention matmuls at 8 bits."""
    bits, width = (8, None) if site.is_matmul else (weight_bits, input_bits)
    formats = backends.formats(site.kind, bits, input_bits=8 if site.kind == "patch_embed" else width)
    tensors: Mapping[str, Tensor] = {
        f"{operand}.scale": torch.ones(site.step_shape(operand, fmt.granularity))
        for operand, fmt in formats.items()
        if fmt.has_steps
    }
    return SiteParams(site.kind, formats, tensors, site.params)
