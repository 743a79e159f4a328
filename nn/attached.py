"""Parameters that a trained method adds to the module that owns an attention, and how they reach it.

Each is an ordinary module inside the owner: named, saved, moved, sharded and optimized with it. A forward pre-hook of
the owner puts its tensors into the graph that is traced; a model that is not compiled does not use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attn_ops.attach import ATTACH


class Attached(nn.Module):
    """What can be attached: `names` are the op's arguments that `tensors` gives, `key` is its name in the owner."""

    key: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    def tensors(self, hidden: Tensor) -> list[Tensor]:
        """The tensors to hand over, from the owner's input (B, S, C)."""
        raise NotImplementedError


class SlaProjection(Attached):
    """The projection of SLA's linear branch, `proj_l`: a Linear(head_dim, head_dim) for all heads, zero at first.

    Paper: https://arxiv.org/abs/2509.24006.
    """

    key, names = "sla", ("weight", "bias")

    def __init__(self, head_dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj_l = _zero_linear(head_dim, head_dim, **factory)

    def tensors(self, _hidden: Tensor) -> list[Tensor]:
        """The weight (D, D) and the bias (D,)."""
        return [self.proj_l.weight, self.proj_l.bias]


class VsaGate(Attached):
    """The gate of VSA's coarse branch, `to_gate_compress`: a Linear from the owner's input to all heads, zero at first.

    Paper: https://arxiv.org/abs/2505.13389.
    """

    key, names = "vsa", ("gate",)

    def __init__(self, channels: int, heads: int, head_dim: int, **factory: Any) -> None:
        super().__init__()
        self.to_gate_compress = _zero_linear(channels, heads * head_dim, **factory)

    def tensors(self, hidden: Tensor) -> list[Tensor]:
        """The gate, (B, S, H * D)."""
        return [self.to_gate_compress(hidden)]


def _zero_linear(channels: int, out: int, **factory: Any) -> nn.Linear:
    linear = nn.Linear(channels, out, **factory)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def attach(owner: nn.Module, attached: Attached) -> None:
    """Add it to the owner, which hands it over from now on. The owner has none of that kind, and no such attribute."""
    owner.add_module(attached.key, attached)
    if not _is_handing_over(owner):
        owner.register_forward_pre_hook(hand_over, with_kwargs=True)


def detach(owner: nn.Module) -> list[str]:
    """Take everything attached, and the hook, away again; returns the names of what was there."""
    keys = [key for key, child in owner.named_children() if isinstance(child, Attached)]
    for key in keys:
        delattr(owner, key)
    for number, hook in list(owner._forward_pre_hooks.items()):
        if hook is hand_over:
            del owner._forward_pre_hooks[number]
            owner._forward_pre_hooks_with_kwargs.pop(number, None)
    return keys


def _is_handing_over(owner: nn.Module) -> bool:
    return any(hook is hand_over for hook in owner._forward_pre_hooks.values())


def hand_over(owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The hook of an owner: put the tensors of what is attached to it into the graph that is traced."""
    if not torch.compiler.is_compiling():
        return
    hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    for child in owner.children():
        if isinstance(child, Attached):
            ATTACH(list(child.names), child.tensors(hidden))
