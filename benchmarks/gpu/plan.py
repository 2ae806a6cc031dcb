"""What is run on a GPU, most valuable first."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: "function" or "function:arguments", as `parts.py` reads it.
        least_s: not started with less time left than this.
        limit_s: stopped after this.
    """

    name: str
    least_s: int = 20
    limit_s: int = 150


MODELS = ("vit_base_patch16_224", "deit_small_patch16_224", "deit_tiny_patch16_224", "vit_large_patch16_224")

PARTS = (
    Part("correctness"),
    Part("ceilings", limit_s=60),
    Part("gemm"),
    Part("attention", limit_s=60),
    Part("tune:vit_base_patch16_224:64", limit_s=180),
    Part("model:vit_base_patch16_224:64:max-autotune", 60, 240),
    Part("tune:deit_small_patch16_224:64", limit_s=180),
    Part("model:deit_small_patch16_224:64:max-autotune", 60, 240),
    Part("tune:vit_base_patch16_224:1", limit_s=180),
    Part("model:vit_base_patch16_224:1:max-autotune", 60, 240),
    Part("logits", limit_s=60),
    Part("model:vit_base_patch16_224:8:default", 40, 150),
    Part("tune:deit_tiny_patch16_224:64", limit_s=180),
    Part("model:deit_tiny_patch16_224:64:max-autotune", 60, 240),
    Part("peers:vit_base_patch16_224:64", 60, 240),
    Part("gemlite:vit_base_patch16_224:64", 60, 240),
    Part("sageattention", limit_s=60),
    *(Part(f"model:{name}:{batch}:default", 40, 150) for name in MODELS for batch in (1, 8, 64, 256)),
)


def sources_digest() -> str:
    """Digest of the sources that a timing depends on; a result made from others is outdated."""
    digest = hashlib.sha256()
    for folder in ("kernels/gpu", "lampq_rt"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if folder == "kernels/gpu" or path.name.startswith(("modules", "runner")):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
