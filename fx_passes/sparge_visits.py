"""Where SpargeAttention is tuned: behind every self-attention of a model, on the tensors that are there.

The graphs that Dynamo traces run op by op, with a call behind each site. What the model computes stays dense
attention's, and nothing of q, k and v outlives the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..attn_ops.backends.sparge import sparge_attention
from ..attn_ops.blocks.sparge_map import sparge_block_map
from ..attn_ops.capability import Capability
from ..lowering.decide import decide
from ..lowering.policy import Policy
from ..lowering.rule import Rule
from .calibration.attend import at_every_site
from .place_op import arguments_of
from .sites import CallSite

_THRESHOLDS = ("mass", "pv_threshold")
_NOT_OF_THE_MAP = ("pv", "provider")


@dataclass(frozen=True, eq=False)
class Visit:
    """One run of a site.

    Args:
        module: path of the module that owns it.
        q: (B, Hq, S, D).
        k: (B, Hkv, S, D).
        v: (B, Hkv, S, D).
        dense: (B, Hq, S, D), what dense attention gave.
        arguments: of the op, but for the thresholds.
    """

    module: str
    q: Tensor
    k: Tensor
    v: Tensor
    dense: Tensor
    arguments: Mapping[str, Any]

    @property
    def heads(self) -> int:
        """Heads of q."""
        return self.q.shape[1]

    def error(self, mass: Tensor, similarity: Tensor, pv_threshold: Tensor | None = None) -> Tensor:
        """Relative L1 of every head to dense attention, for thresholds (Hq,) fp32: (Hq,) fp64, NaN if ours is NaN."""
        ours, _ = sparge_attention(
            *(self.q, self.k, self.v),
            masses=mass,
            similarities=similarity,
            pv_thresholds=pv_threshold,
            **self.arguments,
        )
        dense = self.dense.float()
        wrong, whole = _sum_by_head((ours.float() - dense).abs()), _sum_by_head(dense.abs())
        return wrong / whole.clamp_min(torch.finfo(whole.dtype).tiny)

    def density(self, mass: Tensor, similarity: Tensor) -> Tensor:
        """Share of the blocks that every head keeps of those that dense attention would need: (Hq,) fp64."""
        return self._blocks(masses=mass, similarities=similarity) / self._all_blocks

    @functools.cached_property
    def _all_blocks(self) -> Tensor:
        return self._blocks(mass=1.0)

    def _blocks(self, **thresholds: Any) -> Tensor:
        """Blocks that every head keeps: (Hq,) fp64."""
        chooses = {name: value for name, value in self.arguments.items() if name not in _NOT_OF_THE_MAP}
        _, count = sparge_block_map(self.q, self.k, **chooses, **thresholds)
        return count.sum(dim=(0, 2), dtype=torch.float64)


def _sum_by_head(value: Tensor) -> Tensor:
    return value.sum(dim=(0, 2, 3), dtype=torch.float64)


@dataclass
class Visits:
    """Every site that a rule for `sparge` matches and can serve is visited whenever the model runs.

    Args:
        rule: which sites, and the parameters.
        on_visit: what is done there; it may be changed between runs.
    """

    rule: Rule
    on_visit: Callable[[Visit], None] | None = None
    _refused: dict[str, str] = field(default_factory=dict)

    def backend(self, gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        """For torch.compile: the graph as it is, with a call behind every site."""
        return at_every_site(gm, self._place)

    def why_not(self) -> str:
        """Why the sites that were found could not be served, one line for each."""
        return "".join(f"\n  {module or 'in no module'}: {why}" for module, why in sorted(self._refused.items()))

    def _place(self, site: CallSite) -> None:
        decision = decide(site.call, Capability.current(site.device), Policy([self.rule]), module=site.module)
        if decision.is_dense or isinstance(site.scale, fx.Node):
            self._refused[site.module] = decision.why if decision.is_dense else "its scale is computed in the graph"
            return
        if not site.module:
            self._refused[""] = f"the attention of {site.source} is in no module, so nothing can be kept for it"
            return
        arguments = {
            name: value for name, value in arguments_of(site, decision, None).items() if name not in _THRESHOLDS
        }
        with site.node.graph.inserting_after(site.node):
            probe = _Probe(site.module, arguments, self)
            site.node.graph.call_function(probe, (site.q, site.k, site.v, site.node))


class _Probe:
    """Stands behind a site in a graph."""

    __name__ = "probe"  # the code of a graph calls it by name

    def __init__(self, module: str, arguments: Mapping[str, Any], of: Visits) -> None:
        self._module, self._arguments, self._of = module, arguments, of

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> None:
        if self._of.on_visit is not None:
            q, k, v = (value if value.stride(-1) == 1 else value.contiguous() for value in (q, k, v))
            self._of.on_visit(Visit(self._module, q, k, v, dense, self._arguments))
