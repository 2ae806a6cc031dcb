"""What it takes to build a timm VisionTransformer again without its weights: read from the model, checked, followed.

A description is plain JSON: {"family": "timm_vit", "class": …, "name": timm's name or null, "kwargs": arguments of the
constructor}. It is read from the instance, not from how it was made, so that models built by hand, resized or given a
new head are covered too. `describe` tries its own answer: it builds the model on the meta device and compares every
module. A model that cannot be built again gets {"family", "class", "obstacle"} instead: it can be compiled, not saved.

`build` is meant for files from strangers: only known classes, names and arguments of the right type and a sane size are
let through, nothing is downloaded, and no memory is taken.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import GELU, Attention, DropPath, GELUTanh, LayerNorm, Mlp, PatchDropout, QuickGELU, RmsNorm
from timm.models import is_model_in_modules, model_entrypoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from lampq_rt.errors import CheckpointError

FAMILY = "timm_vit"
CLASSES: dict[str, type[VisionTransformer]] = {c.__name__: c for c in (VisionTransformer, VisionTransformerDistilled)}
TIMM_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")
"""Modules of `timm.models` whose names are built."""

NORMS: dict[str, type[nn.Module]] = {
    "timm.LayerNorm": LayerNorm,
    "torch.LayerNorm": nn.LayerNorm,
    "timm.RmsNorm": RmsNorm,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "torch.GELU": nn.GELU,
    "timm.GELU": GELU,
    "timm.GELUTanh": GELUTanh,
    "timm.QuickGELU": QuickGELU,
    "torch.ReLU": nn.ReLU,
    "torch.SiLU": nn.SiLU,
}

_PASS = (nn.Identity, nn.Dropout, DropPath, PatchDropout)  # in eval mode they hand on what they get
_IGNORED = frozenset(
    (
        "training",
        "fused_attn",
        "grad_checkpointing",
        "distilled_training",
        "weight_init_mode",
        "fix_init",
        "init_values",
    )
)  # attributes that do not change what a model computes in eval mode


def describe(model: nn.Module) -> dict[str, Any]:
    """Arguments from which `build` makes a model of the same architecture, or the reason why there are none.

    Args:
        model: a timm VisionTransformer, of any subclass.

    Returns:
        A JSON-able dict, see the module; with an "obstacle" where `build` cannot do it.
    """
    kind = type(model).__name__
    name = _registered_name(model)
    obstacle = f"its class {type(model).__module__}.{kind} is not timm's"
    try:
        kwargs = _kwargs(model)
    except (AttributeError, TypeError, IndexError) as cause:  # an unusual subclass, or parts were replaced
        return {"family": FAMILY, "class": kind, "obstacle": f"its arguments cannot be read ({cause})"}
    candidates: list[dict[str, Any]] = []
    if name is not None:
        candidates.append({"family": FAMILY, "class": kind, "name": name, "kwargs": kwargs})
    if type(model) in CLASSES.values():
        layers = _layers(model)
        candidates.append({"family": FAMILY, "class": kind, "name": None, "kwargs": {**kwargs, **layers}})
    for candidate in candidates:
        try:
            difference = _difference(model, build(candidate))
        except CheckpointError as error:
            difference = str(error)
        if difference is None:
            return candidate
        obstacle = difference
    return {"family": FAMILY, "class": kind, "obstacle": " ".join(obstacle.split())}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """A model of that architecture on the meta device: shapes, no memory. Nothing is downloaded.

    Args:
        architecture: what `describe` gave, perhaps by way of a file.

    Raises:
        CheckpointError: it is not such a dict, or holds an obstacle, an unknown name or class, or an argument that is
            not allowed; the message names the field.
    """
    if not isinstance(architecture, Mapping) or architecture.get("family") != FAMILY:
        raise CheckpointError(f'architecture: expected an object with "family": "{FAMILY}"; got {architecture!r:.80}')
    if "obstacle" in architecture:
        obstacle = " ".join(str(architecture["obstacle"]).split())
        raise CheckpointError(f"this model cannot be rebuilt from a checkpoint because {obstacle:.200}")
    if set(architecture) != {"family", "class", "name", "kwargs"}:
        raise CheckpointError(
            f"architecture: expected the keys family, class, name, kwargs; got {sorted(architecture)!r:.80}"
        )
    kind, name = architecture["class"], architecture["name"]
    if not isinstance(kind, str) or kind not in CLASSES:
        raise CheckpointError(f"architecture.class: expected {' or '.join(CLASSES)}; got {kind!r:.80}")
    if name is not None and not _is_registered(name):
        raise CheckpointError(f"architecture.name: this version of timm has no Vision Transformer called {name!r:.80}")
    kwargs = _checked(architecture["kwargs"])
    make: Callable[..., nn.Module] = (
        CLASSES[kind] if name is None else partial(model_entrypoint(name), pretrained=False)
    )
    try:
        with torch.device("meta"):
            model = make(**kwargs, weight_init="skip")
    except Exception as cause:  # arguments that contradict each other fail anywhere in timm or torch, in any way
        text = " ".join(str(cause).split())[:200]
        raise CheckpointError(f"architecture: timm cannot build it: {type(cause).__name__}: {text}") from None
    if type(model) is not CLASSES[kind]:
        raise CheckpointError(f"architecture: {name} is a {type(model).__name__}, not a {kind}")
    return model.eval()


def _is_registered(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch("[a-z0-9_]+", name)) and is_model_in_modules(name, TIMM_MODULES)


def _registered_name(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    return name if _is_registered(name) else None


def _kwargs(model: Any) -> dict[str, Any]:
    """Constructor arguments read from an instance; those of parts that are not standard are left to the name."""
    embed = model.patch_embed
    is_plain = {name: isinstance(getattr(model, name), nn.Identity) for name in ("norm", "fc_norm", "norm_pre")}
    found: dict[str, Any] = {
        "img_size": _pair(embed.img_size),
        "patch_size": _pair(getattr(embed, "patch_size", None)),
        "in_chans": getattr(model, "in_chans", None) or getattr(getattr(embed, "proj", None), "in_channels", 3),
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "class_token": model.cls_token is not None,
        "reg_tokens": getattr(model, "num_reg_tokens", 0),
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "pre_norm": not is_plain["norm_pre"],
        "final_norm": not (is_plain["norm"] and is_plain["fc_norm"]),
        "fc_norm": not is_plain["fc_norm"],
        "pool_include_prefix": getattr(model, "pool_include_prefix", False),
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": getattr(embed, "dynamic_img_pad", False),
    }
    block = next((b for b in model.blocks if type(b) is Block and type(b.attn) is Attention), None)
    if block is not None:
        attn, mlp = block.attn, block.mlp
        found |= {
            "num_heads": attn.num_heads,
            "qkv_bias": attn.qkv.bias is not None,
            "qk_norm": not isinstance(attn.q_norm, nn.Identity),
            "scale_attn_norm": not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity),
            "proj_bias": attn.proj.bias is not None,
            "init_values": None if isinstance(block.ls1, nn.Identity) else 1e-5,
        }
        if type(mlp) is Mlp:
            found["mlp_ratio"] = _ratio(mlp.fc1.out_features, model.embed_dim)
            found["scale_mlp_norm"] = not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity)
    known = inspect.signature(VisionTransformer.__init__).parameters
    return {key: value for key, value in found.items() if key in known and value is not ...}


def _pair(size: Any) -> Any:
    """A size as JSON holds it: one number for a square, a list for a rectangle, nothing (...) where there is none."""
    if size is None:
        return ...
    height, width = (int(side) for side in size)
    return height if height == width else [height, width]


def _ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` for which timm's int(width * ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _layers(model: nn.Module) -> dict[str, Any]:
    """Norm and activation, where they are not timm's defaults and can be named."""
    found: dict[str, Any] = {}
    norm = next((m for m in model.modules() if type(m) in NORMS.values()), None)
    if norm is not None and (type(norm) is not LayerNorm or norm.eps != LayerNorm(1, device="meta").eps):
        found["norm_layer"] = [next(name for name, kind in NORMS.items() if kind is type(norm)), norm.eps]
    act = next((m for m in model.modules() if type(m) in ACTIVATIONS.values()), None)
    if act is not None and type(act) is not nn.GELU:
        found["act_layer"] = next(name for name, kind in ACTIVATIONS.items() if kind is type(act))
    return found


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _size(high: int) -> Callable[[Any], bool]:
    side = _whole(1, high)
    return lambda value: side(value) or (isinstance(value, list) and len(value) == 2 and all(map(side, value)))


def _real(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low < value <= high


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(choice) and value == choice for choice in allowed)


def _is_norm(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _one_of(*NORMS)(value[0]) and _real(0, 1)(value[1])


_FLAG = _one_of(True, False)
_ALLOWED: dict[str, Callable[[Any], bool]] = {
    "img_size": _size(16_384),
    "patch_size": _size(1_024),
    "in_chans": _whole(1, 1_024),
    "num_classes": _whole(0, 1_000_000),
    "global_pool": _one_of("", "avg", "avgmax", "max", "token", "map", "prr"),
    "embed_dim": _whole(1, 16_384),
    "depth": _whole(0, 256),
    "num_heads": _whole(1, 1_024),
    "mlp_ratio": _real(0, 64),
    "init_values": lambda value: value is None or _real(0, 1)(value),
    "pos_embed": _one_of("", "none", "learn"),
    "reg_tokens": _whole(0, 1_024),
    "norm_layer": _is_norm,
    "act_layer": _one_of(*ACTIVATIONS),
} | dict.fromkeys(
    (
        *("qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "class_token", "no_embed_class"),
        *("pre_norm", "final_norm", "fc_norm", "pool_include_prefix", "dynamic_img_size", "dynamic_img_pad"),
    ),
    _FLAG,
)
"""Every argument that `build` passes on, and whether a value is allowed."""


def _checked(kwargs: Any) -> dict[str, Any]:
    """The arguments as timm takes them.

    Raises:
        CheckpointError: one that is unknown, or whose value is not allowed.
    """
    if not isinstance(kwargs, Mapping):
        raise CheckpointError(f"architecture.kwargs: expected an object; got {kwargs!r:.80}")
    for key, value in kwargs.items():
        if key not in _ALLOWED:
            raise CheckpointError(
                f"architecture.kwargs: unknown argument {key!r:.80}; allowed: {', '.join(sorted(_ALLOWED))}"
            )
        if not _ALLOWED[key](value):
            raise CheckpointError(f"architecture.kwargs.{key}: {value!r:.80} is not allowed")
    result: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    if "norm_layer" in result:
        name, eps = result["norm_layer"]
        result["norm_layer"] = partial(NORMS[name], eps=eps)
    if "act_layer" in result:
        result["act_layer"] = ACTIVATIONS[result["act_layer"]]
    return result


def _difference(model: nn.Module, rebuilt: nn.Module) -> str | None:
    """The first thing in which two models differ that matters for inference, in words; None where nothing does."""
    mine, theirs = (dict(_modules(m)) for m in (model, rebuilt))
    for name in (*mine, *(name for name in theirs if name not in mine)):
        if name not in theirs or name not in mine:
            return f"it {'has' if name in mine else 'lacks'} a module {name}, unlike what timm builds"
        a, b = mine[name], theirs[name]
        where = name or "the model"
        if type(a) is not type(b) and not (isinstance(a, _PASS) and isinstance(b, _PASS)):
            return f"{where} is a {type(a).__name__}, where timm builds a {type(b).__name__}"
        replaced = [key for key, value in vars(a).items() if callable(value) and callable(getattr(type(a), key, None))]
        if replaced:
            return f"{where} has its method {replaced[0]} replaced"
        if isinstance(a, _PASS):
            continue
        for key, value in vars(b).items():
            if key.startswith("_") or key in _IGNORED or not _is_simple(value):
                continue
            if vars(a).get(key, value) != value:
                return f"{where} has {key} = {vars(a)[key]!r:.60}, where timm builds {value!r:.60}"
    shapes, others = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (model, rebuilt))
    for name in (*shapes, *(name for name in others if name not in shapes)):
        if shapes.get(name) != others.get(name):
            return f"{name} has shape {shapes.get(name)}, where timm builds {others.get(name)}"
    return None


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module, under every name it has."""
    return model.named_modules(remove_duplicate=False)


def _is_simple(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_simple(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
