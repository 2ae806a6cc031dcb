"""What the compiler, the simulation and the calibrator ask of a model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from lampq_rt.plan import SiteParams
from lampq_rt.sites import Description


class Adapter(Protocol):
    """One model family."""

    def matches(self, model: nn.Module) -> bool:
        """True where this adapter understands the model's class."""
        ...

    def describe(self, model: nn.Module) -> Description:
        """Sites in order of execution, and what is left out with its reason.

        Raises:
            ModelError: nothing in the model can be quantised.
        """
        ...

    def simulate(self, model: nn.Module) -> nn.Module:
        """A copy of `model` whose sites are `lampq_rt.simulate` modules, reachable by site name."""
        ...

    def integer(
        self, model: nn.Module, sites: Mapping[str, SiteParams], backend: str, residual_dtype: str = "float16"
    ) -> nn.Module:
        """A copy of `model` whose sites run integer ops; shares no parameter that the caller could change."""
        ...

    def shortened(self, model: nn.Module, blocks: int) -> nn.Module:
        """A copy of `model` with its first `blocks` transformer blocks only, for counting what a block does."""
        ...

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        """JSON-able arguments from which `skeleton` rebuilds the model without its weights."""
        ...

    def skeleton(self, architecture: Mapping[str, Any]) -> nn.Module:
        """A model of that architecture on the meta device.

        Raises:
            CheckpointError: the arguments are not those of a model this family can build.
        """
        ...
