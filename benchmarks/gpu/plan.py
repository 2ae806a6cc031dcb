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
        needs: package without which it is left out.
    """

    name: str
    least_s: int = 20
    limit_s: int = 150
    needs: str = ""

    @property
    def function(self) -> str:
        """Of `parts.py`."""
        return self.name.partition(":")[0]


MODELS = ("vit_base_patch16_224", "deit_small_patch16_224", "deit_tiny_patch16_224", "vit_large_patch16_224")

PARTS = (
    Part("compile", 40, 90),
    Part("correctness", 40),
    Part("logits", 30, 60),
    Part("ceilings", limit_s=60),
    Part("model:vit_base_patch16_224:64:default", 60, 180),
    Part("tune:vit_base_patch16_224:64", 60, 120),
    Part("model:vit_base_patch16_224:64:max-autotune", 60, 240),
    Part("attention", limit_s=60),
    Part("tune:vit_base_patch16_224:1", 60, 120),
    Part("model:vit_base_patch16_224:1:max-autotune", 60, 240),
    Part("tune:deit_small_patch16_224:64", 60, 120),
    Part("model:deit_small_patch16_224:64:max-autotune", 60, 240),
    Part("gemm", 60, 120),
    Part("tune:deit_tiny_patch16_224:64", 60, 120),
    Part("model:deit_tiny_patch16_224:64:max-autotune", 60, 240),
    Part("peers:vit_base_patch16_224:64", 60, 240, needs="torchao"),
    Part("gemlite:vit_base_patch16_224:64", 60, 240, needs="gemlite"),
    Part("sageattention", limit_s=60, needs="sageattention"),
    *(Part(f"model:{name}:{batch}:default", 60, 150) for name in MODELS for batch in (1, 8, 256)),
    *(Part(f"model:{name}:64:default", 60, 150) for name in MODELS[1:]),
)
"""What says whether the kernels are right, and the first ratio to `torch.compile`, come before what tunes them."""

PER_MACHINE = ("compile", "ceilings")
"""Run on every machine anew: what they leave, or say, belongs to it."""


def sources_digest() -> str:
    """Digest of the sources that a timing depends on; a result made from others is outdated."""
    digest = hashlib.sha256()
    for folder in ("kernels", "kernels/gpu", "lampq_rt"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if folder != "lampq_rt" or path.name.startswith(("modules", "runner", "compiler", "standin")):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
