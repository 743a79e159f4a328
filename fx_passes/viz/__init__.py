"""Pictures: how dense and how wrong every layer is, what a budget buys, which blocks a site reads. Extra `viz`.

Every picture is a matplotlib `Figure` made without pyplot: `figure.savefig("density.png")`. Matplotlib is imported when
the first one is drawn.
"""

from .block_map import block_map
from .budget_curve import budget_curve
from .density_map import density_map
from .error_map import error_map
from .site_blocks import site_blocks

__all__ = ["block_map", "budget_curve", "density_map", "error_map", "site_blocks"]
