"""The torch.compile backend: rewrite the graph that Dynamo traced, then hand it to the inner backend.

torch.compile(model, backend="sparseattn") finds it by its entry point. The graph is rewritten before autograd, so that
one pass serves inference and training; nothing global is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch._dynamo
from torch import fx

from ..lowering.policy import Policy
from ..lowering.precedence import effective_policy
from .cache import compile_with_inductor, guard_on_policy_state
from .options import INDUCTOR, Options
from .parallel.agree import agree
from .publish import publish
from .report import Report
from .rewrite import rewrite_graph
from .self_check import compile_checked
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
            "capability", "hoist_tiling" (False leaves the tiling in every site), "fused_prologue" (True rounds q and k
            in the graph wherever that is possible, False nowhere), "parallel" (a ContextParallel, docs/parallel.md),
            "check", "on_failure", "check_limit" (comparison with dense attention, see docs/policy.md), "mode", and any
            Inductor option.

    Raises:
        PolicyError: on a wrong option or policy.
        RequirementError: if a rule with mode="require" matches a site that its backend cannot serve.
        ParallelError: if a site has shards of the sequence that cannot be exchanged.
    """
    asked = Options.parse(mode, options)
    policy = effective_policy(asked.policy)
    if policy is None and asked.parallel is not None:  # attention over shards alone would be another
        policy = Policy((), name="disabled")
    guard_on_policy_state(policy)
    compile_graph = functools.partial(_compile, asked, example_inputs)
    if policy is None:
        return compile_graph(gm, StepValues(gm))
    rewrite = functools.partial(_rewrite, asked, policy)
    if asked.check is not None:
        return compile_checked(gm, asked.check, rewrite, compile_graph)
    if policy.varies:
        gm = with_room(gm)
    values = StepValues(gm)
    publish(rewrite(gm, values=values))
    return compile_graph(gm, values)


def _rewrite(asked: Options, policy: Policy, gm: fx.GraphModule, **how: Any) -> Report:
    report = rewrite_graph(
        gm,
        policy,
        asked.capability,
        hoist=asked.hoist_tiling,
        fuse=asked.fused_prologue,
        parallel=asked.parallel,
        **how,
    )
    if asked.parallel is not None:
        agree(asked.parallel, report)
    return report


def _compile(
    asked: Options, example_inputs: Sequence[Any], gm: fx.GraphModule, values: StepValues
) -> Callable[..., Any]:
    inputs = [*example_inputs, *values.examples()]
    if asked.inner_backend == INDUCTOR:
        return values.feed(compile_with_inductor(gm, inputs, asked.inductor))
    return values.feed(torch._dynamo.lookup_backend(asked.inner_backend)(gm, inputs))
