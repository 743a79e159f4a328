"""tune_sparge: thresholds of SpargeAttention for every layer and head, from a few samples and a bound on the error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..attn_ops.errors import PolicyError
from ..lowering.rule import Rule
from ..lowering.sparge_tuning import SpargeSite, SpargeTuning, fixed_params
from .calibration.progress import shown
from .calibration.samples import Sample
from .explain import traced_afresh
from .sparge_search import Check, MassSearch, PvSearch, Search, Settings
from .sparge_visits import Visits

SIMILARITIES = (-1.0, *(n / 16 for n in range(1, 16)))
"""No test, then ever more blocks that fail it. A block's similarity is never below 0."""

_ROUNDS = 8
"""What more rounds still move keeps every block."""


def tune_sparge(
    model: Callable[..., Any],
    samples: Iterable[Sample | Sequence[Any] | Mapping[str, Any]],
    *,
    l1: float = 0.07,
    pv_l1: float | None = 0.08,
    modules: str | Sequence[str] = "*",
    params: Mapping[str, Any] | None = None,
    similarities: Sequence[float] = SIMILARITIES,
    progress: bool = True,
) -> SpargeTuning:
    """The sparsest thresholds of every self-attention and head that stay within an error of dense attention.

        tuning = sparseattn.tune_sparge(model, [(latents, t, text) for t in some_timesteps])
        model = torch.compile(model, backend="sparseattn", options={"policy": Policy(tuning.rules())})

    The model runs with dense attention. On the q, k and v of every site, for every similarity threshold, the least mass
    is searched whose relative L1 is below `l1`; then, with those that keep the fewest blocks, the least threshold of
    the second stage whose relative L1 is below `pv_l1`. A sample raises what it needs higher, and samples are run again
    until none does: the error of every sample is within, measured with the thresholds that are returned. A head that
    leaves out no more than a tenth of the blocks keeps all of them; a site without another head, or where rounding
    alone is beyond `l1`, stays dense.

    Args:
        model: a module; it is not changed.
        samples: its inputs: tuples of arguments, dicts of keyword arguments, or `Sample`, whose step has no part here.
        l1: bound of the relative L1 of every head's output, sum of |ours - dense| / sum of |dense|.
        pv_l1: the same with the second stage, larger than `l1`; None for no second stage.
        modules: globs of the modules to tune, as in a rule.
        params: parameters of `sparge` that are not tuned: sink, smooth_k, pv, block_q, block_k.
        similarities: thresholds of the similarity test to search at, -1 ... 1; 0 or less is no test.
        progress: show progress bars, where tqdm is installed.

    Raises:
        PolicyError: if an argument is not valid, there is no sample, or the model has no self-attention that `sparge`
            can serve.

    Paper: https://arxiv.org/abs/2502.18137
    """
    _check_bounds(l1, pv_l1)
    visits = Visits(_rule(modules, params or {}, pv_l1 is not None))
    run = _Runner(traced_afresh(model, visits.backend), _calls(samples), visits, progress)
    by_mass = MassSearch(_as_similarities(similarities), l1)
    run.until_settled(by_mass, "mass")
    settings = by_mass.chosen()
    if not settings:
        raise PolicyError(f"tune_sparge: no self-attention of this model can be served.{visits.why_not()}")
    if pv_l1 is not None:
        by_pv = PvSearch(settings, pv_l1)
        run.until_settled(by_pv, "second stage")
        by_pv.put()
    check = Check(settings)
    run.once(check, "check")
    bound = l1 if pv_l1 is None else pv_l1
    sites = [_site(module, found, check, l1, bound) for module, found in settings.items()]
    return SpargeTuning(sites, params or {}, l1=float(l1), pv_l1=None if pv_l1 is None else float(pv_l1))


class _Runner:
    """Runs the model on all samples, and a search at every site meanwhile."""

    def __init__(self, model: Callable[..., Any], calls: Sequence[Sample], visits: Visits, progress: bool) -> None:
        self._model, self._calls, self._visits, self._progress = model, calls, visits, progress

    def until_settled(self, search: Search, what: str) -> None:
        """Rounds, until the thresholds rise no more."""
        for number in range(1, _ROUNDS + 1):
            search.begin()
            self.once(search, f"{what}, round {number}")
            if search.is_settled:
                return
        search.give_up()

    def once(self, search: Search | Check, what: str) -> None:
        """All samples."""
        self._visits.on_visit = search.visit
        with torch.no_grad(), shown(len(self._calls), f"tuning sparge: {what}", self._progress) as advance:
            for call in self._calls:
                self._model(*call.args, **call.kwargs)
                advance(1)


def _site(module: str, found: Settings, check: Check, l1: float, bound: float) -> SpargeSite:
    error, density = check.of(module)
    is_within = torch.where(found.sparse, error < bound, error < l1)  # NaN is not
    if not found.sparse.any():
        return _dense(module, found, "no head leaves out more than a tenth of the blocks")
    if not is_within.all():
        head = int((~is_within).nonzero()[0])
        kept = "its thresholds" if found.sparse[head] else "every block kept"
        return _dense(module, found, f"head {head} has the relative L1 {float(error[head]):.3g} with {kept}")
    pv_threshold = () if found.pv_threshold is None else found.pv_threshold.tolist()
    return SpargeSite(
        *(module, found.mass.tolist(), found.similarity.tolist(), pv_threshold, found.sparse.tolist()),
        sparsity=(1 - density).tolist(),
        error=error.tolist(),
    )


def _dense(module: str, found: Settings, why: str) -> SpargeSite:
    heads = len(found.sparse)
    nothing = [0.0] * heads
    return SpargeSite(
        *(module, [1.0] * heads, [-1.0] * heads, (), [False] * heads), sparsity=nothing, error=nothing, why=why
    )


def _check_bounds(l1: Any, pv_l1: Any) -> None:
    if type(l1) not in (int, float) or not 0 < l1 < math.inf:
        raise PolicyError(f"tune_sparge: l1 must be a positive number, a relative L1, got {l1!r}.")
    if pv_l1 is not None and (type(pv_l1) not in (int, float) or not l1 < pv_l1 < math.inf):
        raise PolicyError(
            f"tune_sparge: pv_l1 must be a number larger than l1 {l1}, or None for no second stage, got {pv_l1!r}."
        )


def _as_similarities(given: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise PolicyError(
            f"tune_sparge: similarities must be a list of numbers, got {given!r}. Write (-1.0,) for none."
        )
    for value in given:
        if type(value) not in (int, float) or not -1 <= value <= 1:
            raise PolicyError(f"tune_sparge: similarities must be in -1 ... 1, got {value!r}.")
    return tuple(map(float, given))


def _rule(modules: str | Sequence[str], params: Mapping[str, Any], second_stage: bool) -> Rule:
    """Which sites are tuned; with the thresholds that will be set, so that the same provider computes them later."""
    searched = {"mass": 0.5, **({"pv_threshold": 1.0} if second_stage else {})}
    return Rule("sparge", modules=modules, kind="self", params={**dict(fixed_params(params)), **searched})


def _calls(samples: Iterable[object]) -> list[Sample]:
    calls = list(samples)
    if not calls:
        raise PolicyError("tune_sparge: no samples. Give at least one tuple of the model's inputs.")
    for call in calls:
        if not isinstance(call, Sample | Mapping | tuple | list):
            raise PolicyError(
                "tune_sparge: a sample is a tuple of arguments, a dict of keyword arguments or a Sample, "
                f"got {type(call).__name__}."
            )
    return [Sample.of(call) for call in calls]
