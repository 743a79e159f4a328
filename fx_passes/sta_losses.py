"""sta_losses: what each window of Sliding Tile Attention costs, for every step, layer and head of a model.

`StaStrategy.search` chooses a window for each from these losses; upstream's tools read and write the same tables.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attn_ops.errors import PolicyError
from ..attn_ops.step_range import Step
from ..attn_ops.video_layout import VideoLayout
from ..lowering.rule import Rule
from ..lowering.sta_search import as_candidate
from ..lowering.sta_strategy import Window, json_path
from ..lowering.steps import At
from .calibration.progress import shown
from .calibration.samples import Sample
from .explain import traced_afresh
from .sta_probe import WindowLosses

NAMES = ("L2_loss", "L1_loss")
"""Upstream's names of the mean squared and the mean absolute difference."""

Table = dict[str, list[list[list[float]]]]
"""Window, as "[3, 1, 10]" -> losses as [step][layer][head]."""


@dataclass(frozen=True, eq=False)
class StaLosses(Mapping[str, Table]):
    """Losses of candidate windows, as `losses["L2_loss"]["[3, 1, 10]"][step][layer][head]`.

    Args:
        tables: the tables "L2_loss" and "L1_loss", mean squared and mean absolute differences to dense attention.
        modules: module paths of the layers, in order: what `StaStrategy.rules` takes.
        full: the window of all tiles: what `StaStrategy.search` takes.
    """

    tables: dict[str, Table] = field(repr=False)
    modules: tuple[str, ...]
    full: Window

    def __getitem__(self, name: str) -> Table:
        return self.tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tables)

    def __len__(self) -> int:
        return len(self.tables)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write upstream's `mask_search_*.json`, which `StaStrategy.search` reads too.

        Raises:
            PolicyError: if the path does not end in .json.
        """
        json_path(path).write_text(json.dumps(self.tables), encoding="utf-8")


def sta_losses(
    model: Callable[..., Any],
    samples: Iterable[Sample | Sequence[Any] | Mapping[str, Any]],
    *,
    windows: Sequence[str | Sequence[int]],
    total_steps: int | None = None,
    modules: str | Sequence[str] = "*",
    layout: VideoLayout | Mapping[str, object] | Sequence[int] | None = None,
    params: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> StaLosses:
    """Measure candidate windows of Sliding Tile Attention beside the dense attention of a model.

        losses = sparseattn.sta_losses(model, samples, windows=["3, 1, 10", "1, 5, 7"], total_steps=50)
        strategy = StaStrategy.search(losses, full=losses.full, skip_time_steps=12)
        policy = Policy(strategy.rules(losses.modules))

    The model runs with dense attention. Behind each self-attention whose video layout is known every window runs on the
    q, k and v that are there. The loss of a head is the mean over batch, tokens (text too) and D of the difference to
    the dense output, over all samples of a step: prompts, and both passes of classifier-free guidance.

    Args:
        model: a module or function; it is not changed.
        samples: its inputs: tuples of arguments, dicts of keyword arguments, or `Sample`, which may name a step. All of
            one size of video.
        windows: (t, h, w) in tiles, as [3, 1, 10] or "3, 1, 10".
        total_steps: length of the loop around the model, where samples name their step; each step needs one.
        modules: globs on the module paths of the attention.
        layout: VideoLayout of the sites, as a rule takes it; None takes what the graph shows.
        params: further parameters of `sta`: `tile` (6, 8, 8 unless given) and `text_length`.
        progress: show a progress bar, where tqdm is installed.

    Raises:
        PolicyError: if an argument is not valid, there is no sample, a step has none or is outside the loop, a window
            exceeds all tiles, no attention has a known layout, or samples or layers differ in what cannot differ.

    Paper: https://arxiv.org/abs/2502.04507
    """
    measured = WindowLosses(_rules(windows, modules, layout, params))
    calls = _calls(samples, total_steps)
    run, called = traced_afresh(model, measured.backend), set[str]()
    # One graph for every length of text: under symbolic sizes a layout would be that of the length traced first.
    limit = max(torch._dynamo.config.recompile_limit, len(calls))
    fixed = torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=limit)
    with torch.no_grad(), fixed, shown(len(calls), "measuring", progress) as advance:
        for number, call in enumerate(calls):
            measured.called.clear()
            with contextlib.nullcontext() if call.step is None else At(Step(call.step, total_steps)):
                run(*call.args, **call.kwargs)
            called = called or set(measured.called)
            _check(measured, number, called)
            advance(1)
    (full,) = measured.fulls
    return StaLosses(_tables(measured, total_steps or 1), tuple(dict.fromkeys(name for _, name in measured.sums)), full)


def _rules(
    windows: Sequence[str | Sequence[int]], modules: str | Sequence[str], layout: Any, params: Mapping[str, Any] | None
) -> dict[Window, Rule]:
    """The rule that tries each window."""
    given = dict(params or {})
    if "window" in given:
        raise PolicyError("sta_losses: params must not have a window. Give windows.")
    if isinstance(windows, str) or not windows:
        raise PolicyError(f'sta_losses: windows must be a list of some, such as ["3, 1, 10"], got {windows!r}.')
    tried = dict.fromkeys(map(as_candidate, windows))
    return {
        window: Rule("sta", modules=modules, kind="self", layout=layout, params={**given, "window": window})
        for window in tried
    }


def _calls(samples: Iterable[Any], total: int | None) -> list[Sample]:
    calls = [Sample.of(given) for given in samples]
    if not calls:
        raise PolicyError("sta_losses: no samples. Give at least one tuple of the model's inputs.")
    if total is not None and (type(total) is not int or total < 1):
        raise PolicyError(f"sta_losses: total_steps must be an int of at least 1, got {total!r}.")
    named = {call.step for call in calls}
    if named == {None} and total is None:
        return calls
    if None in named or total is None:
        raise PolicyError("sta_losses: where samples name a step, all must, and total_steps says how many there are.")
    if outside := [step for step in named if step not in range(total)]:
        raise PolicyError(f"sta_losses: step {outside[0]} is not in 0 ... {total - 1}.")
    if missing := [step for step in range(total) if step not in named]:
        raise PolicyError(f"sta_losses: no sample has step {missing[0]}. Every step needs one.")
    return calls


def _check(measured: WindowLosses, number: int, called: set[str]) -> None:
    """Raises PolicyError unless a sample was measured like the first, with windows that fit."""
    if not called:
        told = "".join(f"\n  {name}: {why}" for name, why in sorted(measured.refused.items()))
        raise PolicyError(f"sta_losses: no attention of this model can be measured.{told}")
    if len(measured.fulls) > 1:
        tiles = ", ".join(f"{full} at {name}" for full, name in measured.fulls.items())
        raise PolicyError(f"sta_losses: a strategy is for one number of tiles, got {tiles}. Choose by modules.")
    if apart := sorted(called ^ measured.called):
        raise PolicyError(
            f"sta_losses: sample {number} did not measure the layers of the first: {', '.join(apart)}. "
            "Give samples of one size that run through the same layers."
        )
    (full,) = measured.fulls
    for window in measured.rules:
        if any(extent > whole for extent, whole in zip(window, full, strict=True)):
            raise PolicyError(f"sta_losses: windows must be within the {list(full)} tiles, got {list(window)}.")


def _tables(measured: WindowLosses, total: int) -> dict[str, Table]:
    names = list(dict.fromkeys(name for _, name in measured.sums))
    means = [[measured.sums[step, name].mean() for name in names] for step in range(total)]
    _check_heads(dict(zip(names, means[0], strict=True)))
    losses = torch.stack([torch.stack(layers) for layers in means])  # (steps, layers, 2, windows, heads)
    return {
        name: {str(list(window)): losses[:, :, kind, at].tolist() for at, window in enumerate(measured.rules)}
        for kind, name in enumerate(NAMES)
    }


def _check_heads(layers: Mapping[str, Tensor]) -> None:
    heads = {losses.shape[-1]: name for name, losses in layers.items()}
    if len(heads) > 1:
        told = ", ".join(f"{count} at {name}" for count, name in heads.items())
        raise PolicyError(f"sta_losses: all layers of a strategy have as many heads, got {told}. Choose by modules.")
