"""Plans: at which modules of a model its tokens are split over the ranks, and where they are brought together again.

A plan names modules, as `named_modules` does, and their arguments or results. That of a model is found by the name of
its class here, or is the one that diffusers gives its models for its own context parallelism, `_cp_plan`. Text that is
in the same sequence stays whole: every rank computes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...attn_ops.errors import ParallelError


@dataclass(frozen=True)
class Split:
    """Split an argument or a result: every tensor in it, along a dimension.

    Args:
        dim: dimension of the tokens, from the front.
        rank: dimensions that a tensor must have to be split; None for any. Some arguments have tokens only at times.
    """

    dim: int
    rank: int | None = None

    def applies(self, tensor: Tensor) -> bool:
        """Whether a tensor is split."""
        return self.rank is None or tensor.dim() == self.rank


@dataclass(frozen=True)
class Mask:
    """An attention mask over the whole sequence, which attention needs whole.

    Args:
        tokens: arguments (B, S, C) of the same module whose local tokens together it is for.
    """

    tokens: tuple[str, ...] = ("hidden_states",)


@dataclass(frozen=True)
class Gather:
    """Bring the result of a module together.

    Args:
        dim: dimension of the tokens.
    """

    dim: int = 1


Entry = Mapping[str | int, Split | Mask] | Gather
"""Arguments by name and results by place, or that the result is gathered."""

Plan = Mapping[str, Entry]
"""Globs on module paths, and what happens there; a module may match several."""

_HIDDEN: Entry = {"hidden_states": Split(1)}
_ROTARY: Entry = {0: Split(1), 1: Split(1)}
_HUNYUAN_MASK: Entry = {"attention_mask": Mask(("hidden_states", "encoder_hidden_states"))}
_DECODER: Plan = {
    "layers.0": _HIDDEN,
    "layers.*": {"attention_mask": Mask()},
    "rotary_emb": _ROTARY,
    "norm": Gather(),
}

PLANS: dict[str, Plan] = {
    "CogVideoXTransformer3DModel": {
        "": {"image_rotary_emb": Split(0)},
        "transformer_blocks.0": _HIDDEN,
        "proj_out": Gather(),
    },
    "HunyuanVideoTransformer3DModel": {
        "rope": {0: Split(0), 1: Split(0)},
        "transformer_blocks.0": _HIDDEN,
        "transformer_blocks.*": _HUNYUAN_MASK,
        "single_transformer_blocks.*": _HUNYUAN_MASK,
        "proj_out": Gather(),
    },
    "LTXVideoTransformer3DModel": {"rope": _ROTARY, "transformer_blocks.0": _HIDDEN, "proj_out": Gather()},
    "WanTransformer3DModel": {
        "": {"timestep": Split(1, rank=2)},
        "rope": _ROTARY,
        "blocks.0": _HIDDEN,
        "proj_out": Gather(),
    },
    "LlamaModel": _DECODER,
    "MistralModel": _DECODER,
    "Qwen2Model": _DECODER,
    "Qwen3Model": _DECODER,
}
"""By the name of a class, of the model or of a module inside it."""


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model.

    Raises:
        ParallelError: if none is known.
    """
    for path, module in model.named_modules():
        plan = PLANS.get(type(module).__name__) or _plan_of_diffusers(module)
        if plan is not None:
            return {".".join(filter(None, (path, inside))): entry for inside, entry in plan.items()}
    raise ParallelError(
        f"shard_model: the plan of {type(model).__name__} must be known or given, and it is not among those of "
        f"{', '.join(sorted(PLANS))}. Write one: shard_model(model, mesh, plan)."
    )


def matches(glob: str, path: str) -> bool:
    """Whether a module is meant; a `*` is a number."""
    return re.fullmatch(re.escape(glob).replace(r"\*", r"\d+"), path) is not None


def _plan_of_diffusers(module: nn.Module) -> Plan | None:
    """The plan that a diffusers model has, in our words."""
    given: Mapping[str, Any] | None = getattr(module, "_cp_plan", None)
    return None if given is None else {path: _entry(entry) for path, entry in given.items()}


def _entry(given: Any) -> Entry:
    if hasattr(given, "gather_dim"):
        return Gather(given.gather_dim)
    if not isinstance(given, Mapping) or not all(hasattr(one, "split_dim") for one in given.values()):
        raise ParallelError(f"shard_model: entries of _cp_plan must split arguments or gather a result, got {given!r}.")
    return {name: Split(one.split_dim, one.expected_dims) for name, one in given.items()}
