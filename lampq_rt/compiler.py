"""`lampq_rt.compile`: a floating-point model and a plan become a module that runs integer kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lampq_rt import backends
from lampq_rt.edits import edited
from lampq_rt.errors import PlanError
from lampq_rt.models import weight_bytes
from lampq_rt.plan import Plan
from lampq_rt.quantizers import flaw, table
from lampq_rt.runner import GraphRunner, l2_bytes, micro_batch_for
from lampq_rt.sites import Description, Site

BACKENDS = ("native", "reference", "triton")
"""`native` runs the device's kernels; `reference` the plain-torch truth, for tests and doubts; `triton` the GPU's
launchers
whatever the device, for Triton's interpreter."""


_making_runner = threading.Lock()
"""Of all models, for making one takes no time, and a model with a lock of its own could not be copied."""


class CompiledModel(nn.Module):
    """An integer model. Inference only: `forward` as the original's, in eval mode.

    Attributes:
        model: the original's skeleton with integer modules in place of its sites.
        plan: the plan it was compiled from.
        architecture: JSON-able arguments that rebuild the skeleton without the original weights.
        use_graphs: False calls the kernels one by one on a GPU, too.
        tune: True tunes linears that no table knows before a batch size's graph is captured (see `compile`).
        image_bytes: input and output of the widest linear for one image, from which `micro_batch` is derived.
        fallbacks: what runs in floating point although the plan says integer, by site, with the reason.
    """

    model: Any
    plan_digest: Tensor

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        architecture: dict[str, Any],
        fallbacks: dict[str, str],
        image_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.architecture = architecture
        self.fallbacks = fallbacks
        self.use_graphs = True
        self.tune = False
        self.image_bytes = image_bytes
        self._micro_batch: int | Literal["auto"] | None = "auto"
        self._runner: GraphRunner | None = None
        self.register_buffer("plan_digest", torch.tensor(list(bytes.fromhex(plan.digest)), dtype=torch.uint8))

    def forward(self, images: Tensor) -> Tensor:
        """fp32 images [B, C, H, W], normalised as for the original, to logits [B, classes].

        On a GPU the call runs as a CUDA graph (`runner`), unless it is being traced or `use_graphs` is off.
        """
        if not images.is_cuda or not self.use_graphs or torch.compiler.is_compiling():
            return self.model(images)
        return self._runner_for(images.device)(images)

    def _runner_for(self, device: torch.device) -> GraphRunner:
        """The one runner, made on the first call: a thread that made a second one would capture every graph again."""
        runner = self._runner
        if runner is None:
            with _making_runner:
                runner = self._runner
                if runner is None:
                    runner = self._runner = self._new_runner(device)
        return runner

    def _new_runner(self, device: torch.device) -> GraphRunner:
        from lampq_rt.tuning import tune_missing

        micro_batch = self._micro_batch
        if micro_batch == "auto":
            micro_batch = micro_batch_for(self.image_bytes, l2_bytes(device))
        prepare = partial(tune_missing, self.model) if self.tune else None
        return GraphRunner(self.model, micro_batch=micro_batch, before_capture=prepare)

    @property
    def micro_batch(self) -> int | Literal["auto"] | None:
        """Images that go through the kernels at once inside a CUDA graph; None: the whole batch.

        "auto" (default) follows `runner.micro_batch_for`, a rule from the size of the L2 cache; still unmeasured.
        Setting it drops the graphs captured so far.
        """
        return self._micro_batch

    @micro_batch.setter
    def micro_batch(self, value: int | Literal["auto"] | None) -> None:
        self._micro_batch, self._runner = value, None

    @property
    def graph_memory_bytes(self) -> int:
        """Bytes that the CUDA graphs captured so far hold: their shared memory pool and static inputs; 0 on a CPU."""
        return 0 if self._runner is None else self._runner.memory_bytes

    def __getstate__(self) -> dict[str, Any]:
        """Copies capture graphs of their own."""
        return {**self.__dict__, "_runner": None}

    def forward_features(self, images: Tensor) -> Tensor:
        """fp32 images [B, C, H, W] to token features [B, N, D], as timm's method."""
        return self.model.forward_features(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Token features [B, N, D] to logits, as timm's method."""
        return self.model.forward_head(features, pre_logits=pre_logits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        """Move to another device, keep every dtype: scales are fp32 by contract, so `.half()` changes nothing."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._runner = None  # its graphs hold the addresses of the buffers

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse the state of a model that was compiled from another plan: its numbers would be read with our steps."""
        came = state_dict.get(f"{prefix}plan_digest")
        if came is not None and not torch.equal(came.cpu(), self.plan_digest.cpu()):
            raise PlanError(
                f"this state comes from a model compiled from another plan than the {self.plan.model} given"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> CompiledModel:
        """Integer models cannot be trained: `train()` leaves eval mode on, so that a caller's habit does no harm."""
        return super().train(False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers in memory: codes in their containers, scales, embeddings, norms.

        What a checkpoint of it needs once loaded; `served_bytes` tells what serving adds.
        """
        return weight_bytes(self)

    @property
    def served_bytes(self) -> int:
        """Bytes that serving holds of the weights: `weight_bytes`, and what kernels repacked for this model so far.

        On a CPU the first forward pass repacks every linear for the processor, one byte a code whatever its width, and
        keeps that beside the stored codes: ask after it, before it nothing is repacked. GPU kernels read the codes as
        they are stored: there it is `weight_bytes`. Activations, and what CUDA graphs hold (`graph_memory_bytes`), are
        not counted.
        """
        from lampq_rt.kernels.cpu.prepack import cached_bytes

        return self.weight_bytes + cached_bytes(self.buffers())

    def save(self, path: str | Path) -> None:
        """Write a checkpoint; see `lampq_rt.checkpoint.save`."""
        from lampq_rt import checkpoint

        checkpoint.save(self, Path(path))


def check_plan(model: nn.Module, plan: Plan) -> Description:
    """Refuse a plan that does not fit `model`: other weights, other sites, formats that no backend executes.

    Returns:
        The model's description.

    Raises:
        PlanError, FormatError: one line that names the site and what is allowed.
    """
    from lampq_rt.adapters import describe

    description = describe(model)
    check_sites(description, plan)
    plan.check_weights(model)
    return description


def check_sites(description: Description, plan: Plan) -> None:
    """Refuse a plan whose sites are not exactly those of `description`, or whose tensors have other shapes.

    Raises:
        PlanError, FormatError: as `check_plan`.
    """
    known = {site.name: site for site in description.sites}
    for name in plan.sites:
        if name not in known:
            raise PlanError(f"the plan names site {name!r}, which {description.architecture} does not have")
    for name, site in known.items():
        if name not in plan.sites:
            raise PlanError(f"the plan has no entry for site {name!r} of {description.architecture}")
        params = plan.sites[name]
        if params.kind is not site.kind:
            raise PlanError(
                f"site {name!r} is a {site.kind} in {description.architecture}, a {params.kind} in the plan"
            )
        backends.check_formats(site, params.formats)
        _check_tensors(site, plan)
    for name, site in known.items():
        if site.is_matmul and plan.sites[name].is_float != plan.sites[f"blocks.{site.block}.attn.qk"].is_float:
            raise PlanError(f"site {name!r}: qk and pv of one block must both be integer, or both in floating point")


def _check_tensors(site: Site, plan: Plan) -> None:
    name, params = site.name, plan.sites[site.name]
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for operand, fmt in params.formats.items():
        if not fmt.has_steps:
            continue
        shape = site.step_shape(operand, fmt.granularity)
        wanted[f"{operand}.scale"] = (torch.float32, shape)
        if not fmt.symmetric:
            wanted[f"{operand}.zero_point"] = (torch.float32 if shape else torch.int32, shape)
        if fmt.scheme == "table":
            wanted[f"{operand}.table"] = (torch.int8, (table.ENTRIES,))
        if fmt.scheme == "levels":
            wanted[f"{operand}.levels"] = (torch.int8, (1 << fmt.bits,))
    optional = {"weight.codes": (torch.int8, (site.out_features, site.in_features))}
    for key in wanted:
        if key not in params.tensors:
            raise PlanError(f"site {name!r}: the plan lacks the tensor {key}")
    for key, tensor in params.tensors.items():
        expected = wanted.get(key) or optional.get(key)
        if expected is None:
            raise PlanError(f"site {name!r}: the plan holds a tensor {key} that its formats do not use")
        if (tensor.dtype, tuple(tensor.shape)) != expected:
            raise PlanError(
                f"site {name!r}: {key} is {tensor.dtype} {tuple(tensor.shape)}; expected {expected[0]} {expected[1]}"
            )
        if key.endswith(".scale") and not bool(((tensor > 0) & tensor.isfinite()).all()):
            raise PlanError(f"site {name!r}: {key} must be positive and finite")
        if key.endswith(".zero_point") and not bool(tensor.isfinite().all()):
            raise PlanError(f"site {name!r}: {key} must be finite")
        if wrong := flaw(key, tensor, params.formats):
            raise PlanError(f"site {name!r}: {key} {wrong}")


def compile(  # noqa: A001
    model: nn.Module,
    plan: Plan,
    device: str | torch.device | None = None,
    *,
    backend: str = "native",
    tune: bool = False,
) -> CompiledModel:
    """Swap every site of `model` for integer kernels as `plan` says. `model` itself is left as it is.

    Args:
        model: a timm model in floating point, with the weights that the plan was made for.
        plan: from `lampq_rt.calibrate.make_plan`, or `Plan.load`.
        device: where the result lies, "cpu" (default) or "cuda".
        backend: "native", or "reference" for the slow truth.
        tune: on a GPU, time the kernels of every linear that no tuning table knows, at the first call of a batch size
            (a minute or so, once a machine: the user's table keeps the result). `lampq tune` does it beforehand.

    Raises:
        ModelError: the model is of no supported family.
        PlanError, FormatError: the plan does not fit this model.
        BackendError: the device cannot run it.
    """
    from lampq_rt.adapters import adapter_for

    if backend not in BACKENDS:
        raise backends.BackendError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    target = backends.resolve(device)
    description = check_plan(model, plan)
    adapter = adapter_for(model)
    edited_model = edited(model, plan.edits, plan.activations)
    integer = adapter.integer(edited_model, plan.sites, backend, plan.residual_dtype)
    left_out = backends.fallbacks(plan.sites, target)
    compiled = CompiledModel(integer, plan, adapter.architecture(model), left_out, description.image_bytes)
    compiled.tune = tune
    return compiled.to(target).eval().requires_grad_(False)
