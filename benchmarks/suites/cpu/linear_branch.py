"""What SLA's linear branch can say in the tiny video model: how much of its output differs from query to query.

Per self-attention layer: the attention weight in the blocks that SLA keeps; and the part of |output|^2 that is variance
over queries, of the linear branch before its projection and of exact attention. What does not vary is a constant, which
the bias behind the attention can learn as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparseattn.attn_ops.blocks.block_index import mask_of
from sparseattn.attn_ops.blocks.sla_method import SlaMethod
from sparseattn.attn_ops.numerics.linear_attention import linear_attention

from harness.case import Case
from harness.record import Row
from suites.examples.from_examples import imported, why_not

NAME = "linear_branch"
SEED = 99


@dataclass(frozen=True)
class Settings:
    """The sparsities of the kept blocks, and how many layers, all if 0."""

    sparsity: tuple[float, ...] = (0.90, 0.95, 0.97)
    layers: int = 0


class SelfAttention(TorchFunctionMode):
    """Collects q, k and v of self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at scaled_dot_product_attention on its way."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = (kwargs[name] for name in ("query", "key", "value")) if "query" in kwargs else args[:3]
            if q.shape == k.shape:
                self.calls.append((q.float(), k.float(), v.float()))
        return func(*args, **kwargs)


@torch.no_grad()
def run(settings: Settings) -> Iterator[Row]:
    """A row for every layer."""
    example = imported("finetune_sla")
    with SelfAttention() as seen:
        example.predict(example.load_model(), *example.sample_batch(SEED)[:3])
    for layer, (q, k, v) in enumerate(seen.calls[: settings.layers or None]):
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        kept = {
            f"kept_at_{sparsity:g}": mass_kept(weights, q, k, sparsity, example.BLOCK) for sparsity in settings.sparsity
        }
        linear = linear_attention(q, k, v, None, feature_map="softmax", block_q=example.BLOCK, block_k=example.BLOCK)
        varies = {"linear_varies": varying(linear), "exact_varies": varying(weights @ v)}
        yield Row(NAME, f"layer {layer}", {"seq": q.shape[2], "block": example.BLOCK}, figures=kept | varies)


def mass_kept(weights: Tensor, q: Tensor, k: Tensor, sparsity: float, block: int) -> float:
    """The mean attention weight of a query in the blocks that are kept."""
    how = SlaMethod(1 - sparsity, "all", "softmax", block, block, False, None)
    kept = mask_of(*how.critical_blocks(q, k), k.shape[2] // block)
    kept = kept.repeat_interleave(block, dim=-1).repeat_interleave(block, dim=-2)
    return float((weights * kept).sum(dim=-1).mean())


def varying(out: Tensor) -> float:
    """The part of |out|^2 that is variance over queries."""
    return float((out - out.mean(dim=2, keepdim=True)).square().mean() / out.square().mean())


CASE = Case(NAME, run, Settings(), Settings((0.9,), 1), why_not)
