"""convert: give a model the trained parameters of sparse methods, without editing it.

The sites are found by tracing. What is added are modules inside the owners of the sites: see `sparseattn.nn`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_ops.errors import PolicyError
from ..lowering.policy import Policy, PolicySource
from ..nn.attached import Attached, SlaProjection, VsaGate, attach, detach
from .explain import explain
from .report import Report, Row

_METHODS: dict[str, type[Attached]] = {"sla": SlaProjection, "sage_sla": SlaProjection, "vsa": VsaGate}
"""Backend -> what it is trained with."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` added.

    Args:
        model: the model.
        policy: the policy to compile it with.
        modules: what was added, by its path in the model, such as "blocks.0.attn1.sla".
        report: every site of the model.
    """

    model: nn.Module
    policy: Policy
    modules: Mapping[str, Attached]
    report: Report

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The added parameters, by their names in the model."""
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters():
                yield f"{path}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The added parameters, for an optimizer that trains them alone or at another rate."""
        return (parameter for _, parameter in self.named_parameters())

    def load_trained(self, state_dict: Mapping[str, Tensor]) -> dict[str, str]:
        """Load SLA projections or VSA gates of a checkpoint whose modules have other names.

        The tensors named `*proj_l.*`, and `*to_gate_compress.*`, are taken in the order of their names, numbers by
        value, for the added modules in the order of the model.

        Returns:
            The name in the checkpoint of every added parameter.

        Raises:
            PolicyError: if their number, or a shape, is another. Nothing is loaded then.
        """
        pairs = dict(pair for kind in ("proj_l", "to_gate_compress") for pair in self._pairs(kind, state_dict))
        if not pairs:
            raise PolicyError("load_trained: the checkpoint has no tensor named *proj_l.* or *to_gate_compress.*.")
        own = dict(self.named_parameters())
        for name, theirs in pairs.items():
            if own[name].shape != state_dict[theirs].shape:
                shapes = f"{tuple(own[name].shape)} and {tuple(state_dict[theirs].shape)}"
                raise PolicyError(f"load_trained: {name} and {theirs} have the shapes {shapes}.")
        with torch.no_grad():
            for name, theirs in pairs.items():
                own[name].copy_(state_dict[theirs])
        return pairs

    def _pairs(self, kind: str, state_dict: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        own = [name for name, _ in self.named_parameters() if f".{kind}." in name]
        theirs = sorted((name for name in state_dict if f".{kind}." in f".{name}"), key=_natural)
        by_name = sorted(own, key=_natural)
        if theirs and len(theirs) != len(own):
            raise PolicyError(
                f"load_trained: the checkpoint has {len(theirs)} tensors of {kind}, the model has {len(own)}. "
                "Convert it with a policy that covers the same layers."
            )
        return list(zip(by_name, theirs, strict=False))

    def remove(self) -> None:
        """Take everything away again: the model is as it was."""
        unconvert(self.model)

    def __str__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        lines = [f"  {path}: {type(module).__name__}" for path, module in self.modules.items()]
        return "\n".join([f"{len(self.modules)} attention sites converted, {count:,} parameters added", *lines])


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def convert(model: nn.Module, policy: PolicySource, example_inputs: Sequence[Any] | Mapping[str, Any]) -> Conversion:
    """Add the parameters that SLA and VSA are trained with to a model, where the policy chooses these methods.

        conversion = sparseattn.convert(model, policy, (latents, timestep, text))
        model = torch.compile(model, backend="sparseattn", options={"policy": policy})

    Each is a module inside the module that owns the site: `sla`, with `proj_l`, a Linear(head_dim, head_dim); or `vsa`,
    with `to_gate_compress`, a Linear from the owner's first tensor to all heads. They are zero, in the dtype and on the
    device of the owner. The graph that backend="sparseattn" compiles uses them; a model that is not compiled with it
    computes what it did before. A checkpoint of the dense model loads with strict=False.

    Args:
        model: a module; it is changed in place.
        policy: decides which sites become sla, sage_sla or vsa; see `Policy.load`.
        example_inputs: its inputs, as a tuple, or a dict of keyword arguments. It is traced, not run.

    Raises:
        PolicyError: if no site becomes one of these methods, an owner has several sites, an attribute of that name, or
            no Linear to read the channels of a gate from. The model is unchanged then.
        RequirementError: if a rule with mode="require" cannot be met.

    `unconvert`, or `remove` of what is returned, takes everything away again.
    """
    chosen = Policy.load(policy)
    args, kwargs = ((), example_inputs) if isinstance(example_inputs, Mapping) else (example_inputs, {})
    report = explain(model, *args, policy=chosen, **kwargs)
    planned = {row.module: _made_for(model, row) for row in _trainable(report)}
    for path, attached in planned.items():
        attach(model.get_submodule(path), attached)
    try:
        report = explain(model, *args, policy=chosen, **kwargs)
    except Exception:
        unconvert(model)
        raise
    modules = {f"{path}.{attached.key}": attached for path, attached in planned.items()}
    return Conversion(model, chosen, modules, report)


def unconvert(model: nn.Module) -> list[str]:
    """Remove what `convert` added to a model, or to what it is a copy of; returns the paths of the removed modules."""
    return [f"{path}.{key}" for path, owner in list(model.named_modules()) for key in detach(owner)]


def _trainable(report: Report) -> list[Row]:
    rows = [row for row in report.rows if row.decision.backend in _METHODS]
    if not rows:
        raise PolicyError(f"convert: no site becomes {', '.join(_METHODS)}.\n{report}")
    counts = [row.module for row in report.rows]
    for row in rows:
        if not row.module:
            raise PolicyError(f"convert: the attention of {row.source} is in no module of the model. Put it into one.")
        if counts.count(row.module) > 1:
            raise PolicyError(f"convert: {row.module} has several attention sites. Leave it out, by modules of a rule.")
    return rows


def _made_for(model: nn.Module, row: Row) -> Attached:
    owner, call = model.get_submodule(row.module), row.call
    assert row.decision.backend is not None
    kind = _METHODS[row.decision.backend]
    if hasattr(owner, kind.key):
        raise PolicyError(f"convert: {row.module} has an attribute {kind.key!r} already. Was it converted before?")
    like = next(owner.parameters(), None)
    factory = {} if like is None else {"dtype": like.dtype, "device": like.device}
    if kind is SlaProjection:
        return SlaProjection(call.head_dim, **factory)
    linear = next((module for module in owner.modules() if isinstance(module, nn.Linear)), None)
    if linear is None:
        raise PolicyError(f"convert: {row.module} has no Linear to read the channels of its gate from. Leave it out.")
    return VsaGate(linear.in_features, call.heads, call.head_dim, **factory)
