"""StaStrategy: a window of Sliding Tile Attention for every step, layer and head, in upstream's files and as rules.

A file is FastVideo's `mask_strategy_*.json`: {"step_layer_head": [t, h, w], ...}, windows in tiles. What upstream wrote
is read and written back byte for byte.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attn_ops.errors import PolicyError
from ..attn_ops.video_layout import VideoLayout
from .policy_file import read_table
from .rule import Mode, Rule

if TYPE_CHECKING:
    from .sta_search import Losses

Window = tuple[int, int, int]
"""(t, h, w) in tiles."""

_KEY = re.compile(r"(0|[1-9][0-9]*)_(0|[1-9][0-9]*)_(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class StaStrategy:
    """Windows of `sta`, found by a search for one model and one size of video.

    Args:
        windows: (t, h, w) in tiles, nested as [step][layer][head].
        full: the window of all tiles; None takes the largest extent of the windows along each axis, which is that of a
            strategy whose first steps are full.

    Raises:
        PolicyError: if the nesting is ragged or empty, a window is not three positive ints, or one exceeds `full`.

    Paper: https://arxiv.org/abs/2502.04507
    """

    windows: Sequence[Sequence[Sequence[Window]]]
    full: Window | None = None

    def __post_init__(self) -> None:
        table = tuple(
            tuple(
                tuple(
                    as_window(window, f"windows[{step}][{layer}][{head}]")
                    for head, window in _entries(heads, f"windows[{step}][{layer}]")
                )
                for layer, heads in _entries(layers, f"windows[{step}]")
            )
            for step, layers in _entries(self.windows, "windows")
        )
        _check_shape(table)
        kinds = {window for layers in table for heads in layers for window in heads}
        largest = [max(extents) for extents in zip(*kinds, strict=True)]
        full = as_window(largest if self.full is None else self.full, "full")
        if any(extent > whole for extent, whole in zip(largest, full, strict=True)):
            raise PolicyError(f"strategy: full must hold every window, got {list(full)} and windows up to {largest}.")
        object.__setattr__(self, "windows", table)
        object.__setattr__(self, "full", full)

    @classmethod
    def load(cls, path: str | os.PathLike[str], full: Window | None = None) -> StaStrategy:
        """The strategy of a `mask_strategy_*.json`.

        Raises:
            PolicyError: if the file cannot be read, is not JSON, or as `parse` does; the message begins with the path.
        """
        return cls.parse(read_table(json_path(path)), full, str(path))

    @classmethod
    def parse(cls, table: object, full: Window | None = None, where: str = "strategy") -> StaStrategy:
        """The strategy of a table {"step_layer_head": [t, h, w]}.

        Args:
            table: the table, in any order.
            full: as of the constructor.
            where: begins the messages.

        Raises:
            PolicyError: on an unknown key, a window that is not three positive ints, or a place without a window.
        """
        if not isinstance(table, Mapping) or not table:
            raise PolicyError(f'{where}: must be a table {{"step_layer_head": [t, h, w]}}, got {_short(table)}.')
        found = {_place(key, where): as_window(window, f"{where}: {key}") for key, window in table.items()}
        steps, layers, heads = (1 + max(numbers) for numbers in zip(*found, strict=True))
        for place in itertools.product(range(steps), range(layers), range(heads)):
            if place not in found:
                raise PolicyError(
                    f"{where}: no window at {'_'.join(map(str, place))}, and there are {steps} steps, {layers} layers "
                    f"and {heads} heads. Give every head of every layer and step one."
                )
        return cls([[[found[s, i, h] for h in range(heads)] for i in range(layers)] for s in range(steps)], full)

    @classmethod
    def search(cls, losses: Losses, *, full: str | Sequence[int], **choices: Any) -> StaStrategy:
        """The strategy of least loss: see `sparseattn.lowering.sta_search.search`, which this calls."""
        from .sta_search import search

        return search(losses, full=full, **choices)

    def to_dict(self) -> dict[str, list[int]]:
        """The table that `parse` reads."""
        return {f"{step}_{layer}_{head}": list(window) for (step, layer, head), window in self._places()}

    def to_json(self) -> str:
        """The text of a `mask_strategy_*.json`, as upstream writes it."""
        return json.dumps(self.to_dict(), indent=4)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `mask_strategy_*.json`, which upstream reads too.

        Raises:
            PolicyError: if the path does not end in .json.
        """
        json_path(path).write_text(self.to_json(), encoding="utf-8")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Steps, layers, heads."""
        return len(self.windows), len(self.windows[0]), len(self.windows[0][0])

    @property
    def sparsity(self) -> float:
        """1 - tiles in the windows / tiles in as many full ones, over all steps, layers and heads; 0 ... 1.

        Upstream's formula. It counts an even side as it is written, where the op widens it by one.
        """
        assert self.full is not None
        seen = sum(math.prod(window) for _, window in self._places())
        return 1 - seen / (math.prod(self.shape) * math.prod(self.full))

    @property
    def shares(self) -> dict[Window, float]:
        """Share of the places that have each window, 0 ... 1, the commonest first."""
        counts = Counter(window for _, window in self._places())
        return {window: count / math.prod(self.shape) for window, count in counts.most_common()}

    def rules(
        self,
        modules: str | Sequence[str],
        *,
        layout: VideoLayout | Mapping[str, object] | Sequence[int] | None = None,
        where_full: str | Sequence[str] = "dense",
        mode: Mode = "prefer",
        params: Mapping[str, Any] | None = None,
    ) -> list[Rule]:
        """The rules of a policy that give every head its window: one for each layer, or for several that are alike.

        The first steps, as long as all their windows are full, are one graph of a compiled model; all others are one
        more, whose windows follow the steps. A layer whose windows change raises an error after the last step.

        Args:
            modules: glob on the module path of the self-attention of a layer, {} for its number, such as
                "blocks.{}.attn1"; or a glob for every layer, in order.
            layout: VideoLayout of the sites, as a rule takes it; None takes what the graph shows.
            where_full: backends, as a rule's `use`, for the first full steps and for layers that are always full.
            mode: of the rules with windows: "prefer" or "require".
            params: further parameters of `sta`: `tile` (6, 8, 8 unless given) and `text_length`.

        Raises:
            PolicyError: on globs that are not one for each layer, a layout that is not of the strategy's canvas, or
                what a rule refuses.
        """
        from .sta_rules import rules

        return rules(self, modules, layout=layout, where_full=where_full, mode=mode, params=params)

    def _places(self) -> Iterator[tuple[tuple[int, int, int], Window]]:
        for step, layers in enumerate(self.windows):
            for layer, heads in enumerate(layers):
                for head, window in enumerate(heads):
                    yield (step, layer, head), window

    def __str__(self) -> str:
        steps, layers, heads = self.shape
        shares = ", ".join(f"{'x'.join(map(str, window))} {share:.1%}" for window, share in self.shares.items())
        return f"{steps} steps x {layers} layers x {heads} heads, sparsity {self.sparsity:.2%}: {shares}"


def as_window(value: object, where: str) -> Window:
    """Three positive ints, from a list of them.

    Raises:
        PolicyError: on anything else; the message begins with `where`.
    """
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise PolicyError(f"{where}: a window must be a list of three positive ints [t, h, w], got {_short(value)}.")
    return value[0], value[1], value[2]


def json_path(path: str | os.PathLike[str]) -> Path:
    """The path, if it ends in .json.

    Raises:
        PolicyError: if it does not.
    """
    if Path(path).suffix != ".json":
        raise PolicyError(f"{path}: a strategy is a .json file, got {Path(path).suffix!r}. Rename it.")
    return Path(path)


def _place(key: object, where: str) -> tuple[int, int, int]:
    form = _KEY.fullmatch(key) if isinstance(key, str) else None
    if form is None:
        raise PolicyError(f'{where}: unknown key {key!r}. A key is "step_layer_head", such as "15_0_3".')
    return int(form[1]), int(form[2]), int(form[3])


def _entries(value: object, where: str) -> Iterator[tuple[int, Any]]:
    """Number and value of the entries of a list that has some."""
    if not isinstance(value, list | tuple) or not value:
        raise PolicyError(f"{where}: must be a list, nested as [step][layer][head], got {_short(value)}.")
    yield from enumerate(value)


def _check_shape(table: tuple[tuple[tuple[Window, ...], ...], ...]) -> None:
    layers, heads = len(table[0]), len(table[0][0])
    for step, row in enumerate(table):
        if len(row) != layers:
            raise PolicyError(f"windows[{step}] must have {layers} layers as windows[0] has, got {len(row)}.")
        for layer, windows in enumerate(row):
            if len(windows) != heads:
                raise PolicyError(f"windows[{step}][{layer}] must have {heads} heads, got {len(windows)}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
