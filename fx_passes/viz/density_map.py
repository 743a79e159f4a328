"""density_map: the share of the scores that every layer computes, by step and head, as a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lowering.policy import Policy, PolicySource
from ..report import Report
from .densities import densities
from .figure import shortened
from .layer_grid import Scale, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCALE = Scale("share of scores computed", 1.0, 0.5, "not said by the rule", (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0))


def density_map(policy: PolicySource, *, report: Report | None = None, total_steps: int | None = None) -> Figure:
    """How dense a policy asks every layer to be: a heat map of layers by steps, one of layers by heads, or both.

    What stays dense, or is exact or quantized, computes all scores. Windows of `sta` are counted where their rule has a
    layout. What a rule does not say is hatched: blocks chosen by mass or similarity, methods without a ratio.

    Args:
        policy: a Policy, or what `Policy.load` takes. Of a rule's backends the first counts, as if it could serve.
        report: the sites of a model, by `sparseattn.explain`; each is a row. None: each glob of the rules is a row, and
            their conditions on length, head_dim and dtype count as met.
        total_steps: length of the loop around the model; None takes what the tables and ranges of the policy say.

    Raises:
        PolicyError: if the policy is not valid, has no rules, or follows steps whose number is not known.
        MissingPackageError: if matplotlib is not installed.
    """
    policy = Policy.load(policy)
    return draw(densities(policy, report, total_steps), _SCALE, f"Density by layer, policy {shortened(policy.name)}")
