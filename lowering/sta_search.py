"""Search of a StaStrategy: from the losses of candidate windows to one window for every step, layer and head.

It reads the `mask_search_*.json` of FastVideo's searches. With only its own arguments it chooses as upstream's tuning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attn_ops.errors import PolicyError
from .policy_file import read_table
from .sta_strategy import StaStrategy, Window, as_window, json_path

LossTable = Mapping[Any, Any]
"""Candidate -> losses, as nested lists or an array [step][layer][head]; or upstream's two of these, by name."""

Losses = str | Path | LossTable | Sequence[str | Path | LossTable]
"""A table, a file of one, a folder of files, or a list of these: one for every prompt and pass of guidance."""


def search(
    losses: Losses,
    *,
    full: str | Sequence[int],
    skip_time_steps: int = 12,
    candidates: Sequence[str | Sequence[int]] | None = None,
    loss: str = "L2_loss",
    budget: float = math.inf,
    sparsity_weight: float = 0.0,
) -> StaStrategy:
    """The strategy of least loss.

    All tables are averaged: prompts, and the positive and negative passes of classifier-free guidance. A head of a step
    from `skip_time_steps` on then gets the window, of those with loss <= budget, of the least

        loss + sparsity_weight * (tiles of the window / tiles of `full`),

    the first of equals, and `full` where none is within the budget. The defaults are upstream's: the least loss, never
    full. To make a strategy sparser, raise the weight: it is the loss that one pays to leave out all tiles.

    Args:
        losses: mean squared differences to full attention for every candidate, step, layer and head: a table, a file,
            a folder (its files *.json with "mask" in the name), or a list of these.
        full: the window of all tiles, as [5, 6, 10] or "5, 6, 10".
        skip_time_steps: the first steps, which stay full. Upstream's function has 12, its pipelines pass 15.
        candidates: the windows to choose from, in the same two forms; None takes those of the first table.
        loss: which of the tables of a file, "L2_loss" or "L1_loss".
        budget: largest loss that a head may have.
        sparsity_weight: see above.

    Raises:
        PolicyError: on a file that cannot be read, a candidate without losses, losses that are not finite and at least
            0 in equally large tables, or an argument out of its range.
    """
    whole = as_candidate(full)
    _check_numbers(skip_time_steps, budget, sparsity_weight)
    tables = [table for given in _each(losses) for table in _tables(given, loss)]
    names = [as_candidate(name) for name in (tables[0] if candidates is None else candidates)]
    windows = [window for window in dict.fromkeys(names) if window != whole]
    if not windows:
        raise PolicyError(f"search: candidates must hold a window besides the full one, got {names}.")
    density = torch.tensor([math.prod(window) / math.prod(whole) for window in windows], dtype=torch.float64)
    chosen = _choose(_mean(windows, tables), density, budget, sparsity_weight)
    chosen[:skip_time_steps] = len(windows)
    table = [*windows, whole]
    return StaStrategy([[[table[n] for n in heads] for heads in layers] for layers in chosen.tolist()], whole)


def as_candidate(value: object) -> Window:
    """The window that [3, 1, 10], "3, 1, 10" or "[3, 1, 10]" writes.

    Raises:
        PolicyError: on anything else.
    """
    if not isinstance(value, str):
        return as_window(value, "candidate")
    words = value.strip().removeprefix("[").removesuffix("]").split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise PolicyError(f'candidate: must be three positive ints, got {value!r}. Write for example "3, 1, 10".')
    return as_window([int(word) for word in words], f"candidate {value!r}")


def _check_numbers(skip_time_steps: object, budget: object, sparsity_weight: object) -> None:
    if type(skip_time_steps) is not int or skip_time_steps < 0:
        raise PolicyError(f"search: skip_time_steps must be an int of at least 0, got {skip_time_steps!r}.")
    for name, number in (("budget", budget), ("sparsity_weight", sparsity_weight)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0:
            raise PolicyError(f"search: {name} must be a number of at least 0, got {number!r}.")
    if sparsity_weight == math.inf:
        raise PolicyError("search: sparsity_weight must be finite. For the sparsest windows write a large number.")


def _each(losses: Losses) -> list[str | Path | LossTable]:
    given = list(losses) if isinstance(losses, list | tuple) else [losses]
    if not given:
        raise PolicyError("search: losses must hold a table, a file or a folder, got an empty list.")
    return given  # type: ignore[return-value]  # what is in it is checked by _tables


def _tables(given: object, loss: str) -> list[dict[Window, Any]]:
    """The tables of a table, a file or a folder, with windows as keys."""
    if isinstance(given, str | Path):
        path = Path(given)
        files = sorted(path.glob("*mask*.json")) if path.is_dir() else [json_path(path)]
        if not files:
            raise PolicyError(f'search: {path} must hold *.json files with "mask" in their names, and has none.')
        return [_windows(read_table(file), loss, f"{file}: ") for file in files]
    return [_windows(given, loss, "search: ")]


def _windows(table: object, loss: str, where: str) -> dict[Window, Any]:
    if isinstance(table, Mapping) and any(isinstance(key, str) and key.endswith("_loss") for key in table):
        if loss not in table:
            raise PolicyError(f"{where}no {loss}. It has {', '.join(map(str, table))}.")
        table = table[loss]
    if not isinstance(table, Mapping) or not table:
        raise PolicyError(f"{where}losses must be a table of candidates, got {type(table).__name__}.")
    try:
        return {as_candidate(key): value for key, value in table.items()}
    except PolicyError as error:
        raise PolicyError(f"{where}{error}") from None


def _mean(windows: Sequence[Window], tables: list[dict[Window, Any]]) -> Tensor:
    """(windows, steps, layers, heads) fp64, the mean over the tables."""
    shape = _losses(windows[0], tables[0], 1).shape
    total = torch.zeros(len(windows), *shape, dtype=torch.float64)
    for number, table in enumerate(tables, 1):
        total += torch.stack([_losses(window, table, number, shape) for window in windows])
    return total / len(tables)


def _losses(window: Window, table: dict[Window, Any], number: int, shape: torch.Size | None = None) -> Tensor:
    """(steps, layers, heads) fp64 of one window in one table."""
    if window not in table:
        raise PolicyError(f"search: table {number} of losses has no candidate {list(window)}.")
    where = f"search: losses of {list(window)} in table {number} must be"
    try:
        losses = torch.as_tensor(table[window], dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{where} numbers: {error}.") from None
    if losses.dim() != 3 or not losses.numel() or losses.shape != (shape or losses.shape):
        raise PolicyError(f"{where} [step][layer][head], of one size everywhere, got {list(losses.shape)}.")
    if not (losses.isfinite() & (losses >= 0)).all():
        raise PolicyError(f"{where} finite and at least 0.")
    return losses


def _choose(losses: Tensor, density: Tensor, budget: float, sparsity_weight: float) -> Tensor:
    """(steps, layers, heads): number of the window of least cost, the first of equals; one past the last for full."""
    within = losses <= budget
    cost = losses + sparsity_weight * density.view(-1, 1, 1, 1)
    best = cost.masked_fill(~within, math.inf).argmin(dim=0)
    return best.where(within.any(dim=0), len(losses))
