"""Trial: a model with any choice at its attention sites, traced once; tells the true error of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx

from ...attn_ops.call import Kind
from ...lowering.rule import Rule
from ..explain import traced_afresh
from ..normalize.graph import value_of
from ..sites import CallSite
from .attend import Attend, at_every_site, serve
from .ledger import Place
from .output_error import OutputError, error_of
from .samples import Samples

Plan = Mapping[Place, Rule]
"""What serves a place; every other one stays dense."""


class Trial:
    """Runs a model by plans.

    Args:
        model: the model.
        samples: what it is run on.
        dense: their outputs with dense attention.
    """

    def __init__(self, model: Callable[..., Any], samples: Samples, dense: Sequence[list[Tensor]]) -> None:
        self._samples, self._dense = samples, dense
        self._run = traced_afresh(model, self._backend)
        self._plan: Plan = {}

    def error(self, plan: Plan) -> OutputError:
        """The error of the output over all samples."""
        return error_of(self.results(plan), self._dense)

    def results(self, plan: Plan) -> Iterator[Any]:
        """What the model gives for every sample."""
        self._plan = plan
        return self._samples.run(self._run)

    def serves(self, module: str, kind: Kind) -> Rule | None:
        """What serves a site now."""
        return self._plan.get(Place(module, kind, self._samples.bucket()))

    def _backend(self, gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        return at_every_site(gm, self._switch)

    def _switch(self, site: CallSite) -> None:
        node = site.node
        switch = Switch(site, self)
        node.args, node.kwargs = (site.q, site.k, site.v, node.args, node.kwargs), {}
        node.target = switch


class Switch:
    """Stands in the place of a site: computes it as the plan says.

    Args:
        site: the site.
        trial: has the plan.
    """

    __name__ = "switch"  # the code of a graph calls it by name

    def __init__(self, site: CallSite, trial: Trial) -> None:
        self._site, self._trial, self._dense = site, trial, cast("Callable[..., Tensor]", site.node.target)
        self._by_token = value_of(site.node).transpose(1, 2).is_contiguous()
        self._attends: dict[Rule, Attend | str] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The site's output, in the layout that the graph was traced with."""
        rule = self._trial.serves(self._site.module, self._site.call.kind)
        if rule is not None and rule not in self._attends:
            self._attends[rule] = serve(self._site, rule)
        attend = "" if rule is None else self._attends[rule]
        if isinstance(attend, str):
            return self._dense(*args, **kwargs)
        out = attend(q, k, v)
        return out.transpose(1, 2).contiguous().transpose(1, 2) if self._by_token else out
