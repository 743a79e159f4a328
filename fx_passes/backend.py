"""The torch.compile backend: rewrite the graph that Dynamo traced, then hand it to the inner backend.

torch.compile(model, backend="sparseattn") finds it by its entry point. The graph is rewritten before autograd, so that
one pass serves inference and training; nothing global is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch._dynamo
from torch import fx

from ..lowering.precedence import effective_policy
from .cache import compile_with_inductor, guard_on_policy_state
from .options import INDUCTOR, Options
from .publish import publish
from .rewrite import rewrite_graph
from .step_values import StepValues, with_room


def sparseattn_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph with its attention rewritten.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: its inputs, fake.
        mode: as in torch.compile, passed to Inductor.
        options: "policy" (a preset name, a path to a .toml or .json file, a dict or a Policy), "inner_backend",
            "capability", "hoist_tiling" (False leaves the tiling in every site), "mode", and any Inductor option.

    Raises:
        PolicyError: on a wrong option or policy.
        RequirementError: if a rule with mode="require" matches a site that its backend cannot serve.
    """
    asked = Options.parse(mode, options)
    policy = effective_policy(asked.policy)
    guard_on_policy_state(policy)
    if policy is not None and policy.varies:
        gm = with_room(gm)
    values = StepValues(gm)
    if policy is not None:
        publish(rewrite_graph(gm, policy, asked.capability, hoist=asked.hoist_tiling, values=values))
    inputs = [*example_inputs, *values.examples()]
    if asked.inner_backend == INDUCTOR:
        return values.feed(compile_with_inductor(gm, inputs, asked.inductor))
    return values.feed(torch._dynamo.lookup_backend(asked.inner_backend)(gm, inputs))
