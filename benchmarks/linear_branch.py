"""What SLA's linear branch can say in the tiny video model: how much of its output differs from query to query.

    python benchmarks/linear_branch.py

Per self-attention layer: the attention weight in the blocks that SLA keeps at 90, 95 and 97 % sparsity; and the part of
|output|^2 that is variance over queries, of the linear branch before its projection and of exact attention. What does
not vary is a constant, which the bias behind the attention can learn as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from sparseattn.attn_ops.blocks.block_index import mask_of
from sparseattn.attn_ops.blocks.sla_method import SlaMethod
from sparseattn.attn_ops.numerics.linear_attention import linear_attention

from finetune_sla import BLOCK, load_model, predict, sample_batch

SPARSITIES = (0.90, 0.95, 0.97)
SEED = 99


class SelfAttention(TorchFunctionMode):
    """Collects q, k and v of self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = (kwargs[name] for name in ("query", "key", "value")) if "query" in kwargs else args[:3]
            if q.shape == k.shape:
                self.calls.append((q.float(), k.float(), v.float()))
        return func(*args, **kwargs)


def mass_kept(weights: Tensor, q: Tensor, k: Tensor, sparsity: float) -> float:
    """The mean attention weight of a query in the blocks that are kept."""
    how = SlaMethod(1 - sparsity, "all", "softmax", BLOCK, BLOCK, False, None)
    kept = mask_of(*how.critical_blocks(q, k), k.shape[2] // BLOCK)
    kept = kept.repeat_interleave(BLOCK, dim=-1).repeat_interleave(BLOCK, dim=-2)
    return float((weights * kept).sum(dim=-1).mean())


def varying(out: Tensor) -> float:
    """The part of |out|^2 that is variance over queries."""
    return float((out - out.mean(dim=2, keepdim=True)).square().mean() / out.square().mean())


@torch.no_grad()
def main() -> None:
    with SelfAttention() as seen:
        predict(load_model(), *sample_batch(SEED)[:3])
    print("layer  kept at 90 %   95 %   97 %  varies: linear  exact")
    for layer, (q, k, v) in enumerate(seen.calls):
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        kept = "".join(f"{mass_kept(weights, q, k, sparsity):7.3f}" for sparsity in SPARSITIES)
        linear = linear_attention(q, k, v, None, feature_map="softmax", block_q=BLOCK, block_k=BLOCK)
        print(f"{layer:5d}       {kept}         {varying(linear):7.3f}{varying(weights @ v):7.3f}")


if __name__ == "__main__":
    main()
