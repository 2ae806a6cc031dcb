"""What a rewrite of the model must do, the registry of those that exist, and the names of a timm ViT's parts.

A rewrite changes parameters and not the function: the floating-point model answers the same before and after (a test
holds 1e-4, relative), only that its operands are easier to quantise. Everything is folded offline into weights, norms,
biases and embeddings, so that the kernels run what they always run. The plan records the new parameters as edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lampq_rt.memory import drop_pages, drop_pages_behind
from lampq_rt.registry import Registry
from lampq_rt.simulate import SimulatedSite, Simulation
from lampq_rt.sites import Description

BATCH = 8
"""Images that run at once."""


@dataclass(frozen=True)
class Context:
    """What a rewrite may look at.

    Attributes:
        description: of the model.
        images: fp32 [n, C, H, W], normalised as for the model.
        seed: of everything random.
    """

    description: Description
    images: Tensor
    seed: int


class Transform(Protocol):
    """A function-preserving rewrite."""

    def __call__(self, model: nn.Module, context: Context) -> str | None:
        """Change the parameters of `model`, in place.

        Returns:
            None where it was applied; else why this model cannot have it, and nothing was changed.
        """
        ...


TRANSFORMS: Registry[Transform] = Registry("rewrite")


@dataclass(frozen=True)
class Attention:
    """A block's attention, whose sites are all in the description."""

    norm: nn.LayerNorm
    qkv: nn.Linear
    proj: nn.Linear
    heads: int
    name: str
    normalises_heads: bool

    @property
    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        """What reads the residual stream, and what writes to it."""
        return self.qkv, self.proj


@dataclass(frozen=True)
class Mlp:
    """A block's MLP, likewise."""

    norm: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    name: str

    @property
    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        """What reads the residual stream, and what writes to it."""
        return self.fc1, self.fc2


def attentions(model: Any, description: Description) -> Iterator[Attention]:
    """Those that can be quantised and have an affine LayerNorm and biases, in order."""
    for block in _blocks(description, "attn.qkv"):
        module = model.blocks[block]
        attn = module.attn
        if _foldable(module.norm1) and attn.qkv.bias is not None and attn.proj.bias is not None:
            normalises = not isinstance(attn.q_norm, nn.Identity)
            yield Attention(module.norm1, attn.qkv, attn.proj, attn.num_heads, f"blocks.{block}.attn", normalises)


def mlps(model: Any, description: Description) -> Iterator[Mlp]:
    """Those that can be quantised and have an affine LayerNorm and biases, in order."""
    for block in _blocks(description, "mlp.fc1"):
        module = model.blocks[block]
        mlp = module.mlp
        if _foldable(module.norm2) and mlp.fc1.bias is not None and mlp.fc2.bias is not None:
            yield Mlp(module.norm2, mlp.fc1, mlp.fc2, f"blocks.{block}.mlp")


def _blocks(description: Description, part: str) -> list[int]:
    return [s.block for s in description.sites if s.block is not None and s.name == f"blocks.{s.block}.{part}"]


def _foldable(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, watchers: dict[str, Callable[..., None]]) -> None:
    """Run the images; each watcher is called with the inputs of the site of its name, a batch at a time."""
    simulation = Simulation(model)
    drop_pages_behind(simulation.model.get_submodule("blocks").children())

    def hook(see: Callable[..., None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: see(*inputs)

    sites: dict[str, SimulatedSite] = {name: simulation.module(name) for name in watchers}
    handles = [site.register_forward_pre_hook(hook(watchers[name])) for name, site in sites.items()]
    try:
        for batch in images.split(BATCH):
            simulation(batch.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()


def set_parameter(parameter: Tensor, value: Tensor) -> None:
    """Give `parameter` a new value, any precision, of its shape."""
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    parameter.data.copy_(value)
    drop_pages()


def random_orthogonal(size: int, seed: int) -> Tensor:
    """fp64 [size, size], orthogonal, entries of about equal size: a Hadamard matrix with random signs where there is
    one (sizes 2^k, 12 * 2^k), a random rotation elsewhere."""
    source = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=source).double() * 2 - 1
    matrix = hadamard(size)
    if matrix is None:
        q, r = torch.linalg.qr(torch.randn(size, size, generator=source, dtype=torch.float64))
        return q * r.diagonal().sign()
    return matrix * signs


def hadamard(size: int) -> Tensor | None:
    """fp64 [size, size] with entries +-1/sqrt(size), rows orthogonal (Sylvester's doubling of 1 and 12), or None."""
    core = size
    while core % 2 == 0 and core not in (12, 1):
        core //= 2
    if core == 3 and size % 12 == 0:
        core = 12
    if core not in (1, 12):
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley12()
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


def _paley12() -> Tensor:
    """Paley's construction for the field of 11 elements."""
    squares = {x * x % 11 for x in range(1, 11)}
    signs = [[0 if i == j else (1 if (i - j) % 11 in squares else -1) for j in range(11)] for i in range(11)]
    jacobsthal = torch.tensor(signs)
    matrix = torch.ones(12, 12, dtype=torch.float64)
    matrix[1:, 1:] = jacobsthal.double() + torch.eye(11, dtype=torch.float64)
    matrix[1:, 0] = -1.0
    matrix[0, 0] = 1.0
    return matrix
