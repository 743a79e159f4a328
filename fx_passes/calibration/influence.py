"""Influence: how much of an error at a site reaches the model's output, head by head.

A small error d of what a site gives becomes J d in the model's output, J being the Jacobian. For random signs r, the
gradient g of <r, output> at the site has <g, d> = <r, J d>, the square of which is |J d| ** 2 on average (Hutchinson
1990). So one backward tells it for every site and head, and for the errors that the candidates really make.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...attn_ops.call import Kind
from ...attn_ops.errors import PolicyError
from ...lowering.rule import Rule
from ..explain import traced_afresh
from ..sites import CallSite
from .attend import Attend, at_every_site, serve
from .candidates import Candidate
from .ledger import Ledger, Place
from .output_error import floating_leaves
from .samples import Samples

_SIGNS = 4
"""Backward passes for each sample."""
_FOLLOWED = 4
"""Candidates of one family whose errors are followed: how far they reach hardly depends on their size."""


class Influence:
    """Adds the reach of errors to a ledger, sample by sample.

    Args:
        model: the model, which must be differentiable.
        samples: what it is run on.
        candidates: whose errors are followed.
        ledger: takes the sums.
    """

    def __init__(
        self, model: Callable[..., Any], samples: Samples, candidates: Sequence[Candidate], ledger: Ledger
    ) -> None:
        self._samples, self._rules, self.ledger = samples, _some(candidates), ledger
        self._run = traced_afresh(model, self._backend)
        self._start = torch.zeros((), requires_grad=True)

    def add(self, first: int) -> Iterator[None]:
        """Follow the errors of every sample from number `first` on; yields after each.

        Raises:
            PolicyError: if the model cannot be differentiated.
        """
        with torch.enable_grad():
            results = self._samples.run(self._run, first)
            for number in itertools.count(first):
                try:
                    result = next(results, None)
                    if result is None:
                        return
                    self._follow(result, number)
                except RuntimeError as error:
                    raise PolicyError(_NOT_DIFFERENTIABLE.format(error)) from error
                yield

    def _follow(self, result: Any, number: int) -> None:
        outputs = [leaf for leaf in floating_leaves(result) if leaf.requires_grad]
        if not outputs:
            raise PolicyError(_NOT_DIFFERENTIABLE.format("its output has no gradient"))
        generator = torch.Generator().manual_seed(number)
        for turn in range(_SIGNS):
            signs = [_signs(output, generator) for output in outputs]
            again = turn < _SIGNS - 1
            torch.autograd.grad(outputs, [self._start], signs, retain_graph=again, allow_unused=True)

    def place(self, module: str, kind: Kind) -> Place:
        """The place of a site in the range of steps that the loop is in now."""
        return Place(module, kind, self._samples.bucket())

    def _backend(self, gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        return at_every_site(gm, self._tap)

    def _tap(self, site: CallSite) -> None:
        served = (serve(site, rule) for rule in self._rules)
        tap = Tap(site, [attend for attend in served if not isinstance(attend, str)], self)
        node = site.node
        with node.graph.inserting_after(node):
            tapped = node.graph.call_function(tap, (node, site.q, site.k, site.v))
        node.replace_all_uses_with(tapped, delete_user_cb=lambda user: user is not tapped)
        tapped.meta = dict(node.meta)

    @property
    def start(self) -> Tensor:
        """What every tap depends on, so that a backward pass reaches all of them and no parameter."""
        return self._start


class Tap:
    """Stands behind a site: passes its output on, and in the backward follows the candidates' errors.

    Args:
        site: the site.
        attends: the candidates that can serve it.
        into: takes the sums.
    """

    __name__ = "tap"  # the code of a graph calls it by name

    def __init__(self, site: CallSite, attends: list[Attend], into: Influence) -> None:
        self._module, self._kind, self._attends, self._into = site.module, site.call.kind, attends, into

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output, (B, H, S, D)."""
        if not self._attends:
            return out
        place = self._into.place(self._module, self._kind)
        followed: Tensor = _Followed.apply(  # type: ignore[no-untyped-call]
            out, self._into.start, self, place, q, k, v
        )
        return followed

    @torch.no_grad()
    def follow(self, grad: Tensor, place: Place, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Add <grad, error> ** 2 and |error| ** 2 of every candidate."""
        for attend in self._attends:
            error = (attend(q, k, v) - out).double()
            reached = (grad * error).sum(dim=(2, 3)).square().sum(dim=0)
            made = error.square().sum(dim=(0, 2, 3))
            self._into.ledger.add_reach(place, reached.tolist(), made.tolist())


class _Followed(torch.autograd.Function):
    """The identity, which tells a tap the gradient."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, _start: Tensor, tap: Tap, place: Place, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        ctx.tap, ctx.place = tap, place
        ctx.save_for_backward(out, q, k, v)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.tap.follow(grad, ctx.place, *ctx.saved_tensors)
        return grad, None, None, None, None, None, None


_NOT_DIFFERENTIABLE = (
    "calibrate: the model cannot be differentiated: {}. "
    'Write weigh="site", which takes errors at all sites for equally important.'
)


def _some(candidates: Sequence[Candidate]) -> list[Rule]:
    """Of every family some that are far apart, without the first, which may be dense attention."""
    families: dict[Rule, list[Rule]] = {}
    for one in candidates:
        families.setdefault(one.family, []).append(one.rule)
    return [
        rule for rules in families.values() for rule in rules[len(rules) > 1 :: max(1, (len(rules) - 1) // _FOLLOWED)]
    ]


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1)
    return signs.to(like.device, like.dtype)
