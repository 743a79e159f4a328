"""Kernels that take lists of key blocks, on the headline workload of 64 x 64 blocks.

Written against fastvideo-kernel 0.3.2, flash-attn-4 4.0.0b36 and nvidia-cudnn-frontend 1.32.0, none of which has run
here yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.case import Case
from harness.clock import Budget
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.workload import Attention, Inputs, Workload, measure, our_providers, ours
from suites.peers.packages import needed

NAME = "peers.block_sparse"


@dataclass(frozen=True)
class Settings:
    """Sizes, turns at most, and seconds that it may take."""

    seq: int = 49152
    heads: int = 12
    dim: int = 128
    keep: int = 76
    repeats: int = 20
    seconds: float = 240.0
    device: str = "cuda"


def run(settings: Settings) -> Iterator[Row]:
    """Rows of both directions; each has half of the seconds."""
    mine = {name: ours(name) for name in our_providers()} if settings.device == "cuda" else {"cpu": ours("cpu")}
    for direction in ("forward", "backward"):
        sizes = settings.seq, settings.heads, settings.dim, settings.keep
        workload = Workload(NAME, *sizes, direction=direction, device=settings.device)
        yield from measure(workload, settings.repeats, Budget(settings.seconds / 2), {**mine, **PEERS})


def flex_attention(inputs: Inputs) -> Attention:
    """FlexAttention of torch with the same blocks, all of them full."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    mask, compiled = inputs.lists.to_block_mask(), torch.compile(flex)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def fastvideo(inputs: Inputs) -> Attention:
    """VSA's ThunderKittens kernel."""
    kernel = needed("fastvideo_kernel", "pip install fastvideo-kernel").block_sparse_attn_from_indices
    index, count = _own_lists(inputs)
    sizes = torch.full((inputs.lists.nk,), inputs.lists.block_k, dtype=torch.int32, device=index.device)
    return lambda q, k, v: kernel(q, k, v, index, count, sizes)[0]


def flash_attention_4(inputs: Inputs) -> Attention:
    """FlashAttention 4 in CuTe DSL, with all blocks full."""
    interface = needed("flash_attn.cute.interface", "pip install flash-attn-4")
    sparsity = needed("flash_attn.cute.block_sparsity", "pip install flash-attn-4")
    index, count = _own_lists(inputs)
    none = torch.zeros_like(count), torch.zeros_like(index)
    blocks = sparsity.BlockSparseTensorsTorch(*none, full_block_cnt=count, full_block_idx=index)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens_first = (x.transpose(1, 2) for x in (q, k, v))
        out = interface.flash_attn_func(*tokens_first, block_sparse_tensors=blocks)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def cudnn_frontend(inputs: Inputs) -> Attention:
    """The block-sparse attention of cuDNN's frontend, in CuTe DSL; its backward is no autograd function."""
    api = needed("cudnn.block_sparse_attention.api", "pip install nvidia-cudnn-frontend[cutedsl]")
    index, count = _own_lists(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = api.block_sparse_attention_forward(q, k, v, index, q2k_block_nums=count, sparse_block_size=64)
        return result[0]

    return attend


def _own_lists(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Index and count for every head, contiguous; -1 behind the count."""
    batch, heads = inputs.qkv[0].shape[:2]
    index, count = (x.expand(batch, heads, *x.shape[2:]).contiguous() for x in (inputs.lists.index, inputs.lists.count))
    listed = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    return index.masked_fill(~listed, -1), count


PEERS: dict[str, Callable[[Inputs], Attention]] = {
    "fastvideo-kernel": fastvideo,
    "flash-attn-4": flash_attention_4,
    "cudnn-frontend": cudnn_frontend,
    "FlexAttention": flex_attention,
}
CASE = Case(NAME, run, Settings(), Settings(256, 2, 32, 2, 1, device="cpu"), why_not)
