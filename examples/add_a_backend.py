"""Add a backend of your own: one file, one op, one spec. Here: attention within chunks of the sequence.

    python examples/add_a_backend.py

A package that others install does the same and names BACKEND in its entry points, group `sparseattn.backends`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparseattn
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.checks import check_qkv, default_scale
from sparseattn.attn_ops.layout import like_query
from sparseattn.attn_ops.op import define_op
from sparseattn.attn_ops.resolve import forward_kernel
from sparseattn.attn_ops.spec import BackendSpec, Param, Provider, Support

CHUNK = 64


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, chunk: int = CHUNK, scale: float | None = None, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The op: validate, find the kernel, run it."""
    check(q, k, v, chunk=chunk)
    kernel = forward_kernel("chunked", provider, q, k)
    return kernel(q, k, v, chunk=chunk, scale=default_scale(scale, q.shape[-1]))


def check(
    q: Tensor, k: Tensor, v: Tensor, *, chunk: int = CHUNK, scale: float | None = None, provider: str = "auto"
) -> None:
    """Runs on real and on fake tensors."""
    del chunk, scale, provider
    check_qkv("chunked_attention", q, k, v)


def kernel(q: Tensor, k: Tensor, v: Tensor, *, chunk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Token i attends to the tokens of its chunk, i // chunk."""
    q_, k_, v_ = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))
    out = scaled_dot_product_attention(q_, k_, v_, scale=scale).flatten(2, 3)
    lse = (scale * (q_ @ k_.mT)).float().logsumexp(dim=-1).flatten(2, 3)
    return like_query(out, q), lse


def why_not(call: AttentionCall, _capability: Capability) -> list[str]:
    """What `Support` cannot say."""
    return [] if call.seq_q % CHUNK == 0 else [f"{call.seq_q} tokens are not a multiple of the chunk, {CHUNK}"]


define_op(
    "chunked_attention",
    f"*, int chunk={CHUNK}, float? scale=None, str provider='auto'",
    forward=forward,
    check=check,
    refusal="chunked_attention: it has no backward. Use flash_attention where gradients are needed.",
)

BACKEND = sparseattn.register(
    BackendSpec(
        name="chunked",
        op="chunked_attention",
        kind="sparse",
        summary="attention within chunks of the sequence",
        params=(Param("chunk", CHUNK, "Tokens per chunk.", low=16, high=1024),),
        support=Support(cross=False, causal=False, grad=False),
        why_not=why_not,
        providers=(Provider("python", "plain PyTorch", load=lambda: kernel),),
    )
)


def attend(q: Tensor) -> Tensor:
    """A model that knows nothing of us."""
    return scaled_dot_product_attention(q, q, q)


if __name__ == "__main__":
    options = {"policy": {"rules": [{"use": "chunked"}]}}
    compiled = torch.compile(attend, backend="sparseattn", options=options, fullgraph=True)
    for length in (256, 200):
        torch._dynamo.reset()
        compiled(torch.randn(1, 2, length, 32))
        print(sparseattn.last_report(), end="\n\n")
