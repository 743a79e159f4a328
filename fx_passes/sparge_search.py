"""The search for SpargeAttention's thresholds, visit by visit: one only rises, until a round of samples moves none.

So what comes out was measured with these very numbers on every sample. All heads are searched in one call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attn_ops.blocks.sparge_arguments import MAX_PV_THRESHOLD
from ..attn_ops.errors import PolicyError
from .sparge_visits import Visit

LEAST_SPARSITY = 0.1
"""A head that leaves out no more than this is not worth it: it keeps every block."""

_EVERY_BLOCK, _MASS_WIDTH = 1.0, 2**-10
_PV_LIMIT, _PV_WIDTH = 50.0, 0.1
_NO_TEST = -1.0


def least(within: Callable[[Tensor], Tensor], start: Tensor, limit: Tensor, width: float) -> Tensor:
    """For every head the least value found that is within, from its start on; its limit where none is found.

    By bisection, as if all above a value that is within were too. Where that is wrong it costs sparsity, not accuracy:
    what is returned was itself within, or is the limit.

    Args:
        within: tells of values (H,) which are.
        start: (H,) fp32.
        limit: (H,) fp32, not tried.
        width: distance from a value that is not within, at which the search ends.
    """
    low, high = start, torch.where(within(start), start, limit)
    while bool((high - low > width).any()):
        middle = (low + high) / 2
        passes = within(middle)
        low, high = torch.where(passes, low, middle), torch.where(passes, middle, high)
    return high


@dataclass
class Rising:
    """Thresholds of one module, (rows, H) fp32 each, that only rise.

    Args:
        values: what they are so far.
        limits: what they are at most.
        visits: of the round.
        moved: bool, which of them the round has raised.
        kept: fp64, shares of the blocks kept, summed over the visits of the round.
    """

    values: Tensor
    limits: Tensor
    visits: int
    moved: Tensor
    kept: Tensor

    @classmethod
    def between(cls, values: Tensor, limits: Tensor) -> Rising:
        """Thresholds at the start of the first round."""
        return cls(values, limits, 0, torch.zeros_like(values, dtype=torch.bool), torch.zeros_like(values).double())

    def move(self, row: int, to: Tensor) -> None:
        """Raise a row, as one visit asks."""
        self.moved[row] |= to != self.values[row]
        self.values[row] = to


class Search(ABC):
    """Thresholds of all modules, raised visit by visit, in rounds over all samples."""

    def __init__(self) -> None:
        self._modules: dict[str, Rising] = {}

    @abstractmethod
    def visit(self, here: Visit) -> None:
        """Raise what this visit asks to be higher."""

    def begin(self) -> None:
        """Begin a round."""
        self._modules = {name: Rising.between(state.values, state.limits) for name, state in self._modules.items()}

    @property
    def is_settled(self) -> bool:
        """Whether the thresholds were measured as they are now at every visit of the round."""
        return all(state.visits == 1 or not state.moved.any() for state in self._modules.values())

    def give_up(self) -> None:
        """Set what the last round still moved to its limit."""
        for state in self._modules.values():
            state.values = torch.where(state.moved, state.limits, state.values)


@dataclass
class Settings:
    """Thresholds of the heads of one module, each (H,), and which heads are sparse."""

    mass: Tensor
    similarity: Tensor
    sparse: Tensor
    pv_threshold: Tensor | None = None


class MassSearch(Search):
    """For every similarity threshold and head, the least mass whose error is below a bound at every visit.

    Args:
        similarities: the thresholds, a row each.
        bound: of the relative L1.
    """

    def __init__(self, similarities: Sequence[float], bound: float) -> None:
        super().__init__()
        self._similarities, self._bound = similarities, bound

    def visit(self, here: Visit) -> None:
        """Raise what this visit asks to be higher."""
        state = self._modules.setdefault(here.module, self._first(here))
        heads = state.values.shape[1]
        if heads != here.heads:
            raise PolicyError(
                f"tune_sparge: sites of {here.module} have {heads} and {here.heads} heads. Leave it out, by modules."
            )
        state.visits += 1
        for row, threshold in enumerate(self._similarities):
            similarity = torch.full_like(state.values[row], threshold)
            state.move(row, self._raised(here, state.values[row], similarity))
            state.kept[row] += here.density(state.values[row], similarity)

    def _first(self, here: Visit) -> Rising:
        shape = len(self._similarities), here.heads
        values = torch.zeros(shape, dtype=torch.float32, device=here.q.device)
        return Rising.between(values, torch.full_like(values, _EVERY_BLOCK))

    def _raised(self, here: Visit, mass: Tensor, similarity: Tensor) -> Tensor:
        every_block = torch.full_like(mass, _EVERY_BLOCK)
        worth_it = here.density(mass, similarity) < 1 - LEAST_SPARSITY  # no higher mass keeps less
        start = torch.where(worth_it, mass, every_block)
        if not worth_it.any():
            return start
        return least(lambda tried: here.error(tried, similarity) < self._bound, start, every_block, _MASS_WIDTH)

    def chosen(self) -> dict[str, Settings]:
        """For every module and head the row that keeps the fewest blocks; of equal ones the first."""
        return {module: self._chosen(state) for module, state in self._modules.items()}

    def _chosen(self, state: Rising) -> Settings:
        kept = torch.where(state.values < _EVERY_BLOCK, state.kept / state.visits, 1.0)
        best = [column.index(min(column)) for column in kept.T.tolist()]  # argmin leaves ties open
        rows = torch.tensor([best], device=kept.device)
        sparse = kept.gather(0, rows)[0] < 1 - LEAST_SPARSITY
        similarity = state.values.new_tensor(self._similarities)[rows[0]]
        return Settings(
            mass=torch.where(sparse, state.values.gather(0, rows)[0], _EVERY_BLOCK),
            similarity=torch.where(sparse, similarity, _NO_TEST),
            sparse=sparse,
        )


class PvSearch(Search):
    """For every sparse head the least threshold of the second stage whose error is below a bound at every visit.

    Args:
        settings: those of every module.
        bound: of the relative L1.
    """

    def __init__(self, settings: dict[str, Settings], bound: float) -> None:
        super().__init__()
        self._settings, self._bound = settings, bound
        for module, found in settings.items():
            limits = torch.where(found.sparse, _PV_LIMIT, MAX_PV_THRESHOLD).to(torch.float32).unsqueeze(0)
            values = torch.where(found.sparse, 0.0, limits)
            self._modules[module] = Rising.between(values, limits)

    def visit(self, here: Visit) -> None:
        """Raise what this visit asks to be higher."""
        state, found = self._modules[here.module], self._settings[here.module]
        state.visits += 1
        if found.sparse.any():
            (start,), (limit,) = state.values, state.limits
            state.move(0, least(lambda tried: self._is_within(here, found, tried), start, limit, _PV_WIDTH))

    def _is_within(self, here: Visit, found: Settings, pv_threshold: Tensor) -> Tensor:
        return here.error(found.mass, found.similarity, pv_threshold) < self._bound

    def put(self) -> None:
        """Put what was found into the settings."""
        for module, state in self._modules.items():
            self._settings[module].pv_threshold = state.values[0]


class Check:
    """The largest error of every head, and the mean share of the blocks that it keeps, with the settings as they are.

    Args:
        settings: those of every module.
    """

    def __init__(self, settings: dict[str, Settings]) -> None:
        self._settings = settings
        self._measured: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def visit(self, here: Visit) -> None:
        """Measure every head."""
        found = self._settings[here.module]
        error = here.error(found.mass, found.similarity, found.pv_threshold)
        self._measured.setdefault(here.module, []).append((error, here.density(found.mass, found.similarity)))

    def of(self, module: str) -> tuple[Tensor, Tensor]:
        """Error and density of the heads of a module, each (H,) fp64; an error that was NaN once is NaN."""
        errors, densities = zip(*self._measured[module], strict=True)
        return torch.stack(errors).amax(dim=0), torch.stack(densities).mean(dim=0)
