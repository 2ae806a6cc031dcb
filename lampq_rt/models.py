"""A timm model by its name, with weights from a file or from timm.

Weights come as safetensors only: a `.pth` file is a pickle, which can run code when it is loaded.
"""

from __future__ import annotations

import difflib
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lampq_rt.errors import ModelError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")


def load_model(name: str, weights: Path | None = None, *, random: bool = False) -> nn.Module:
    """The timm model called `name`, in eval mode, in fp32, on the CPU.

    Args:
        name: timm name, also with a tag ("vit_tiny_patch16_224.augreg_in21k_ft_in1k").
        weights: a safetensors file with exactly the model's tensors. The number of classes is read from its classifier,
            so that a fine-tuned model needs no further option.
        random: without a file, random weights (enough to measure latency) in place of timm's pretrained ones.

    Raises:
        ModelError: unknown name (the message offers close ones), weights that cannot be had, or do not fit.
    """
    check_name(name)
    if weights is not None:
        state = read_weights(weights)
        model = _filled(name, state, weights)
    elif random:
        torch.manual_seed(0)
        model = timm.create_model(name)
    else:
        model = _pretrained(name)
    return model.float().eval()


def check_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ModelError: the message offers the nearest names.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists those that exist"
        raise ModelError(f"unknown model {name!r}; {hint}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(f"{architecture} has no weights tagged {tag!r}; timm knows {', '.join(tags) or 'none'}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, by name.

    Raises:
        ModelError: missing, unreadable, another format, or not finite.
    """
    if path.suffix in PICKLES:
        raise ModelError(
            f"{path}: {path.suffix} files are pickles, which can run code; if you trust it, convert it once "
            "(safetensors.torch.save_file) and give the .safetensors file"
        )
    if not path.is_file():
        raise ModelError(f"weights file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from None
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: {key} holds NaN or infinite values")
    return state


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {(t.data_ptr(), t.numel()): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def classes(model: nn.Module) -> int:
    """Number of outputs of a classifier, in floating point or compiled.

    Raises:
        ModelError: the model has no classifier.
    """
    inner = getattr(model, "model", model)  # a CompiledModel holds its skeleton there
    count = getattr(inner, "num_classes", 0)
    if not isinstance(count, int) or count < 1:
        raise ModelError(f"{type(inner).__name__} has no classifier: there is no top-1 to measure")
    return count


def _classes(name: str, state: Mapping[str, Tensor]) -> int:
    """Number of classes that the file's classifier has; the architecture's own where that cannot be told."""
    config = timm.get_pretrained_cfg(name)
    classifier = config.classifier if config else "head"
    key = classifier[0] if isinstance(classifier, tuple) else classifier
    weight = state.get(f"{key}.weight")
    if weight is not None and weight.ndim == 2:
        return weight.shape[0]
    return config.num_classes if config else 1000


def _filled(name: str, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The model with exactly these tensors. It is built without its random weights, which would take seconds."""
    count = _classes(name, state)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=count)
    own = model.state_dict()
    _check_fit(type(model).__name__, own, state, path)
    if any(key not in own for key, _ in model.named_buffers()):  # computed when built, and not in any file
        model = timm.create_model(name, num_classes=count)
    model.load_state_dict({key: state[key].to(tensor.dtype) for key, tensor in own.items()}, assign=True)
    return model


def _check_fit(name: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file that lacks a tensor, holds another, or holds one of another shape; names the first."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if missing:
        also = f" (it has {unexpected[0]!r}, which the model has not)" if unexpected else ""
        raise ModelError(f"{path}: lacks {len(missing)} tensors of this {name}, first {missing[0]!r}{also}")
    if unexpected:
        raise ModelError(f"{path}: holds {len(unexpected)} tensors that this {name} has not, first {unexpected[0]!r}")
    for key, tensor in own.items():
        if tensor.shape != state[key].shape:
            raise ModelError(f"{path}: {key} is {tuple(state[key].shape)}; this {name} needs {tuple(tensor.shape)}")


def _pretrained(name: str) -> nn.Module:
    """timm's own weights, from its cache or from the network."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ModelError(f"timm has no pretrained weights for {name}; give a file with --weights")
    advice = "; give a file with --weights"
    overlay = {}
    if config.hf_hub_id:
        cached = _cached(config.hf_hub_id)
        if cached is not None:
            overlay = {"file": str(cached)}
        elif not _hub_in_reach():
            raise ModelError(f"no network to fetch timm's weights for {name}{advice}")
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub's client, its HTTP library and timm each raise their own
        cause = re.sub(r"\s+", " ", str(error))[:160]
        raise ModelError(f"cannot fetch timm's weights for {name} ({type(error).__name__}: {cause}){advice}") from None


def _cached(repository: str) -> Path | None:
    """The hub's file for a model where an earlier download left it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model.safetensors")
    return Path(found) if isinstance(found, str) else None


def _hub_in_reach() -> bool:
    """False where the hub's name does not even resolve: its client would try for the better part of a minute."""
    from huggingface_hub import constants

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
