"""rewrite: an exported program, or a graph, with its attention rewritten as backend="sparseattn" would.

    before:  torch.export.export(model, inputs)
    after:   the same program with torch.ops.sparseattn.<op>(q, k, v, ..., provider="...") at its attention sites

A program leaves Python, so nobody tells it the step of a loop: what follows the steps is fixed here, and a number for
each head becomes a constant of the program.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import Tensor, fx
from torch.export import ExportedProgram

from ..attn_ops.capability import Capability
from ..attn_ops.errors import PolicyError
from ..attn_ops.schedule import Schedule
from ..lowering.policy import Policy, PolicySource
from ..lowering.precedence import effective_policy
from ..lowering.steps import At, current_step, steps
from .program_graph import with_graph
from .publish import publish
from .report import Report
from .rewrite import rewrite_graph
from .step_values import StepValues, copied

Program = TypeVar("Program", ExportedProgram, fx.GraphModule)


def rewrite(
    program: Program,
    policy: PolicySource | None = None,
    *,
    capability: str | Capability | None = None,
    step: tuple[int, int] | None = None,
    hoist_tiling: bool = True,
    fused_prologue: bool = False,
) -> tuple[Program, Report]:
    """Rewrite the attention of an exported program, or of a graph from Dynamo or torch.export.

        program, report = sparseattn.rewrite(torch.export.export(model, inputs), policy)
        torch.export.save(program, "model.pt2")                     # whoever loads it writes `import sparseattn` first

    Args:
        program: an ExportedProgram, before or after `run_decompositions`, or a GraphModule whose nodes carry their
            values in meta["val"] or meta["example_value"]. It is left as it is; the result shares its parameters.
        policy: a preset name, a path, a dict or a Policy; None as in torch.compile ("auto" if nothing else is set).
        capability: the machine that the result will run on, "sm90" or a Capability; None means this one. The decisions
            and the providers, which the report names, are for that machine.
        step: (i, n), the step of a loop that the result is for, where the policy follows steps; None means the one that
            `with sparseattn.steps(i, n)` sets.
        hoist_tiling: keep tokens in tile order between sites, where that is exact.
        fused_prologue: round q and k in the graph, wherever that is possible. A compiler of the program may fuse it
            with what makes them; an interpreter, or a runtime with a kernel for the whole op, has more to do.

    Returns:
        The new program, with a valid signature, and the Report of every site.

    Raises:
        PolicyError: if the policy is not valid, follows the steps and there is none, or has a value that cannot reach a
            site.
        RequirementError: if a rule with mode="require" matches a site that its backend cannot serve.
        TypeError: if `program` is neither.
    """
    if not isinstance(program, ExportedProgram | fx.GraphModule):
        raise TypeError(
            f"rewrite: program must be an ExportedProgram or a GraphModule, got {type(program).__name__}. "
            "Write sparseattn.rewrite(torch.export.export(model, inputs), policy)."
        )
    machine = Capability.of(capability) if isinstance(capability, str) else capability
    module = copied(program.graph_module if isinstance(program, ExportedProgram) else program)
    with _at(step):
        report, constants = _rewrite(module, effective_policy(policy), machine, hoist_tiling, fused_prologue)
    publish(report)
    result: Any = with_graph(program, module, constants) if isinstance(program, ExportedProgram) else module
    if result is module:
        _hold(module, constants)
    return result, report


def _at(step: tuple[int, int] | None) -> AbstractContextManager[object]:
    return nullcontext() if step is None else cast(At, steps(*step))


def _rewrite(
    module: fx.GraphModule, policy: Policy | None, machine: Capability | None, hoist: bool, fuse: bool
) -> tuple[Report, dict[fx.Node, Tensor]]:
    """Rewrite in place, for the step that is set; also the inputs that the graph gained and their values."""
    if policy is None:
        return Report(policy="disabled"), {}
    step, follows = current_step(), _follows_steps(policy)
    if follows and step is None:
        raise PolicyError(
            f"rewrite: {follows}, and a program that leaves Python is not told the step. Make one program for each "
            "range of steps: rewrite(program, policy, step=(i, n)) is the one for step i of n."
        )
    values = StepValues(module)
    report = rewrite_graph(module, policy, machine, hoist=hoist, values=values, fuse=fuse)
    if follows:
        note = f"for {step} alone: the policy follows the steps, and the program is not told the step"
        report = replace(report, notes=(*report.notes, note))
    return report, values.bound(step)


def _follows_steps(policy: Policy) -> str:
    """The first rule that follows the steps of a loop, in a phrase; "" if none does."""
    for number, rule in enumerate(policy.rules, 1):
        found = [f"steps = {rule.steps!r}"] if rule.steps else []
        found += [f"{name} is {value}" for name, value in rule.params if isinstance(value, Schedule)]
        if found:
            return f"rule {number} follows the steps of a loop ({', '.join(found)})"
    return ""


def _hold(module: fx.GraphModule, constants: dict[fx.Node, Tensor]) -> None:
    """Turn inputs that have a value into buffers of a graph that is called as before."""
    for node, value in constants.items():
        module.register_buffer(node.name, value, persistent=False)
        with module.graph.inserting_before(node):
            getter = module.graph.get_attr(node.name)
        getter.meta = dict(node.meta)
        node.replace_all_uses_with(getter)
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
