"""Gradients at a quantised model's operating point, with straight-through rounding.

A quantiser's derivative is zero almost everywhere. Inside `straight_through`, each quantised site gives the value
that it gives, y_hat, but passes gradients on as its floating-point form at the same input and with the quantised
weight would. What autograd then finds is how the quantised model, not the floating-point one, answers to small
errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lampq_rt.simulate import SimulatedLinear, SimulatedSite, Simulation


@contextmanager
def straight_through(simulation: Simulation) -> Iterator[None]:
    """Gradients pass the quantised sites of `simulation` while this is entered."""
    sites = [simulation.module(site.name) for site in simulation.description.sites]
    hooks = [site.register_forward_pre_hook(_before) for site in sites]
    hooks += [site.register_forward_hook(_bypass) for site in sites]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if isinstance(module, SimulatedLinear):
        module.hold()


def _bypass(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    assert isinstance(module, SimulatedSite)
    params = module.params
    if params is None:
        if isinstance(module, SimulatedLinear):
            module.release()
        return output
    module.params = None  # not `set_params`, which would also forget the quantised weight
    try:
        smooth = module.forward(*inputs)
    finally:
        module.params = params
        if isinstance(module, SimulatedLinear):
            module.release()
    return smooth + (output - smooth).detach()
