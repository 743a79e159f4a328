"""The rules of a StaStrategy: which layer has which windows at which steps.

No two of them match the same place and step, so their order does not matter. A compiled model has at most two graphs:
windows that change reach the op as a tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..attn_ops.blocks.tiles import Tiling
from ..attn_ops.errors import PolicyError
from ..attn_ops.registry import backend
from ..attn_ops.schedule import Schedule
from ..attn_ops.video_layout import VideoLayout
from .rule import Mode, Rule
from .sta_strategy import StaStrategy, Window


def rules(
    strategy: StaStrategy,
    modules: str | Sequence[str],
    *,
    layout: VideoLayout | Mapping[str, object] | Sequence[int] | None,
    where_full: str | Sequence[str],
    mode: Mode,
    params: Mapping[str, Any] | None,
) -> list[Rule]:
    """See `StaStrategy.rules`."""
    globs, given, first = _globs(modules, strategy.shape[1]), dict(params or {}), _full_steps(strategy)
    if "window" in given:
        raise PolicyError("params: the windows are those of the strategy. Remove window.")
    _check_canvas(strategy, Rule("sta", params=given, layout=layout))
    steps = f"{first}:" if first else None
    found = []
    if first:
        alone = f":{first}" if first < strategy.shape[0] else None
        found.append(Rule(where_full, modules=globs, kind="self", steps=alone, why="STA strategy: full steps"))
    for rows, alike in _alike(strategy, first, globs).items():
        sites: dict[str, Any] = {"modules": alike, "kind": "self", "steps": steps}
        if {window for heads in rows for window in heads} == {strategy.full}:
            found.append(Rule(where_full, **sites, why="STA strategy: a full layer"))
            continue
        own = {**given, "window": _parameter(strategy, first, rows)}
        why = "STA strategy: windows of the step and head"
        found.append(Rule("sta", **sites, mode=mode, params=own, layout=layout, why=why))
    return found


def _globs(modules: str | Sequence[str], layers: int) -> list[str]:
    """One glob for each layer."""
    if isinstance(modules, str):
        if "{}" not in modules:
            raise PolicyError(f'modules must have {{}} for the number of the layer, or be a list, got "{modules}".')
        return [modules.replace("{}", str(layer)) for layer in range(layers)]
    if len(set(modules)) != layers or len(modules) != layers:
        raise PolicyError(
            f"modules must have one glob for each of the strategy's {layers} layers, got {len(modules)}, "
            f"{len(set(modules))} of them different."
        )
    return list(modules)


def _check_canvas(strategy: StaStrategy, rule: Rule) -> None:
    """Raises PolicyError if the rule's layout, where it has one, has other tiles than the strategy was found for."""
    if rule.layout is None:
        return
    tile = cast(Window, dict(backend("sta").complete(rule.params))["tile"])
    tiles = Tiling(rule.layout, tile).grid
    if tiles != strategy.full:
        raise PolicyError(
            f"layout: {rule.layout} has {tiles} tiles of {tile}, and the strategy is for {strategy.full}. "
            "Give the layout and the tile that it was searched with."
        )


def _full_steps(strategy: StaStrategy) -> int:
    """Steps at the beginning whose windows are all full."""
    full = [{window for heads in layers for window in heads} == {strategy.full} for layers in strategy.windows]
    return len(list(itertools.takewhile(bool, full)))


Rows = tuple[tuple[Window, ...], ...]
"""Windows of a layer, as [step][head]."""


def _alike(strategy: StaStrategy, first: int, globs: list[str]) -> dict[Rows, list[str]]:
    """The layers that have the same windows from a step on; none if that is the end."""
    found: dict[Rows, list[str]] = {}
    for layer, glob in enumerate(globs if first < strategy.shape[0] else ()):
        rows = tuple(tuple(layers[layer]) for layers in strategy.windows[first:])
        found.setdefault(rows, []).append(glob)
    return found


def _parameter(strategy: StaStrategy, first: int, rows: Rows) -> list[int] | Schedule:
    """The parameter `window` of a layer: a list where it stays the same, else a table over all steps."""
    assert strategy.full is not None
    flat = [tuple(itertools.chain(*heads)) for heads in rows]
    if len(set(flat)) == 1:
        return list(flat[0])
    skipped = [strategy.full * strategy.shape[2]] * first
    return Schedule(kind="table", values=tuple(skipped + flat))
