"""What the prefix tokens (class token, registers) are worth beside the patches: their share of the gradients.

Of DeiT-Tiny's proj it is 2 % in the first block and all in the last, where nothing else is read. A label is drawn from
the model's own answer to each image, as for its Fisher matrix; one draw is enough for a share. Blocks are checkpointed
(Chen et al. 1604.06174): of the graph of one image, one block's is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lampq_rt.calibrate.distributed import generator
from lampq_rt.memory import drop_pages, trim

Progress = Callable[[int, int], None]


def prefix_shares(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    *,
    prefix: int,
    blocks: Sequence[str] = (),
    labels: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """By name, the share of the first `prefix` tokens in the squared gradient of log p(label) at a module's output.

    Args:
        model: in eval mode and floating point; images in, logits [B, classes] out. It is left as it was.
        images: fp32 [n, C, H, W] on the model's device.
        names: submodules that are called once in a forward pass and return [B, tokens, N].
        prefix: number of tokens before the patches; of none the share is 0.
        blocks: submodules whose graphs are made one at a time; without, the whole graph is held.
        labels: int64 [n]; None draws them from the model's answers.
        seed: of the labels.
        progress: called with the number of images done and n.
    """
    if not prefix:
        return dict.fromkeys(names, 0.0)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def take(gradient: Tensor) -> None:
            energy = gradient.detach().square().sum(-1, dtype=torch.float64)
            sums[name] += torch.stack((energy[:, :prefix].sum(), energy.sum())).cpu()

        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(take)

        return see

    with ExitStack() as entered:
        for name in names:
            entered.callback(model.get_submodule(name).register_forward_hook(hook(name)).remove)
        for name in blocks:
            entered.enter_context(_checkpointed(model.get_submodule(name)))
        for number, image in enumerate(images):
            with torch.enable_grad():
                image = image[None].detach().requires_grad_(True)
                logits = model(image).flatten(1)
                label = _drawn(logits, seed, number) if labels is None else labels[number : number + 1]
                torch.autograd.grad(F.cross_entropy(logits, label.to(logits.device)), image)
            del logits
            trim()
            if progress is not None:
                progress(number + 1, len(images))
    return {name: float(own / whole.clamp_min(1e-300)) for name, (own, whole) in sums.items()}


def _drawn(logits: Tensor, seed: int, number: int) -> Tensor:
    """A label for the image of that number, drawn from the softmax of its logits [1, classes]: int64 [1]."""
    probabilities = logits[0].detach().double().cpu().softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator(seed, number, "prefix"))


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    """While this is entered, the block's activations are made anew on the way back."""
    forward: Any = block.forward

    def run(*args: Any, **extra: Any) -> Any:
        drop_pages()  # of the block that ran before, on the way back, too
        return forward(*args, **extra)

    block.forward = lambda *args, **extra: checkpoint(run, *args, use_reentrant=False, **extra)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del block.forward
