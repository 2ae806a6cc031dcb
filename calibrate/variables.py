"""What an allocator decides on: variables, each a width that one or two operands of a site have.

*Tied*, as in LampQ (AAAI-26, section 4.1): a variable a linear of the blocks, the width of weight and input both;
attention's operands have the nominal width. *Free*: weight and input of a linear have a variable each, and so has
every attention matmul, for both of its operands (the runtime executes no q that is unlike its k).

A variable's name is its site's where it covers the whole site, else "<site>.weight" or "<site>.input".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lampq_rt.sites import BLOCK_LINEARS, Description, Site


@dataclass(frozen=True)
class Variable:
    """One width to choose.

    Attributes:
        name: key in a `Problem` and in penalties.
        site: whose operands have it.
        operands: of `site.operands`, those that have it.
    """

    name: str
    site: Site
    operands: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """True where it is the width of all the site's operands."""
        return len(self.operands) == len(self.site.operands)

    @property
    def has_weight(self) -> bool:
        """True where a weight has it, which `mean_bits` and a latency look at."""
        return "weight" in self.operands


def tied(sites: Iterable[Site]) -> tuple[Variable, ...]:
    """A variable for each linear of the blocks among `sites`, in their order."""
    return tuple(Variable(site.name, site, site.operands) for site in sites if site.kind in BLOCK_LINEARS)


def free(sites: Iterable[Site]) -> tuple[Variable, ...]:
    """Two variables for each linear of the blocks among `sites`, one for each attention matmul, in their order."""
    found: list[Variable] = []
    for site in sites:
        if site.kind in BLOCK_LINEARS:
            found += [Variable(f"{site.name}.{operand}", site, (operand,)) for operand in site.operands]
        elif site.is_matmul:
            found.append(Variable(site.name, site, site.operands))
    return tuple(found)


def of(description: Description, *, free_widths: bool) -> tuple[Variable, ...]:
    """The variables of a model: `free` or `tied`."""
    return free(description.sites) if free_widths else tied(description.sites)
