"""What one rank does in the tests of DistributedAttention: it, on its tokens, and LocalAttention on all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from support.sharded_cases import distance, mesh_of
from support.sharded_ops import GRADED, GRID, HEAD_DIM, TEXT, UNGRADED
from torch import Tensor

from sparseattn import parallel

HEADS, TOKENS = 4, GRID[0] * GRID[1] * GRID[2]
METHODS = {name: params for name, params in {**GRADED, **UNGRADED}.items() if name != "dense"}
ON_GRID = ("sta", "vmoba", "vsa")


def _params(method: str, text: int) -> dict[str, Any]:
    on_grid = {"grid": list(GRID), "text_tokens": text} if method in ON_GRID else {}
    return {**METHODS[method], **on_grid}


def _tensors(tokens: int, kv_heads: int) -> list[Tensor]:
    return [torch.randn(2, tokens, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]


def _leaves(tensors: list[Tensor], grad: bool) -> list[Tensor]:
    return [tensor.clone().requires_grad_(grad) for tensor in tensors]


def _angles() -> tuple[Tensor, Tensor]:
    angles = torch.arange(TOKENS)[:, None] * torch.rand(HEAD_DIM // 2)
    return angles.cos(), angles.sin()


def method(
    name: str, rank: int, ranks: int, *, backend: str = "", text: int = TEXT, gated: bool = False, options: Any = None
) -> float:
    """Outputs, and gradients where there are some: the largest difference, of large entries relative to the largest."""
    text = 0 if name == "vmoba" else text
    mesh, grad, given = mesh_of(ranks), name in GRADED, _params(name, text)
    sizes: dict[str, Any] = {"num_heads": HEADS, "head_size": HEAD_DIM, "num_kv_heads": 2, "softmax_scale": 0.3}
    whole = parallel.LocalAttention(**sizes, method=name, **given)
    parts = parallel.DistributedAttention(**sizes, mesh=mesh, method=name, **given)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    parts.load_state_dict(whole.state_dict())
    if backend:
        parts.compile(backend=backend, fullgraph=True, options=options)
    tokens, words, rotation = _tensors(TOKENS, 2), _tensors(text, 2) if text else [], _angles()
    gates = [torch.rand(2, TOKENS, HEADS, HEAD_DIM)] if gated else []
    with torch.set_grad_enabled(grad):
        own = _leaves([parallel.shard(one, mesh) for one in (*tokens, *gates)], grad)
        own_words = _leaves(words, grad)
        out, text_out = parts(*own[:3], TOKENS, *own_words, freqs_cis=rotation, gate_compress=(own[3:] or [None])[0])
        all_tokens, all_words = _leaves([*tokens, *gates], grad), _leaves(words, grad)
        joint = [torch.cat(parts, dim=1) for parts in zip(all_tokens[:3], *([all_words] if text else []), strict=True)]
        expected = whole(*joint, rotation, *all_tokens[3:])
    first, last = expected[:, :TOKENS], expected[:, TOKENS:]
    found, wanted = [_gathered(out, mesh)], [first]
    if text:
        found, wanted = [*found, text_out], [*wanted, last]
    if grad:
        shares = text_out.square().sum() / ranks if text else 0.0  # every rank has the same
        (out.square().sum() + shares).backward()
        expected.square().sum().backward()
        shared = [*own_words, *parts.parameters()]
        for one in shared:
            dist.all_reduce(one.grad)
        found += [*(_gathered(one.grad, mesh) for one in own), *(one.grad for one in shared)]
        wanted += [one.grad for one in (*all_tokens, *all_words, *whole.parameters())]
    sizes = [max(1.0, float(one.abs().max())) for one in wanted]
    return distance(*([one / size for one, size in zip(ones, sizes, strict=True)] for ones in (found, wanted)))


def _gathered(local: Tensor, mesh: Any) -> Tensor:
    return parallel.gather(local.detach(), mesh, tokens=TOKENS)


def every_method(rank: int, ranks: int) -> dict[str, float]:
    """Eagerly, with text where the method takes some."""
    return {name: method(name, rank, ranks) for name in METHODS}


def other_ways(rank: int, ranks: int) -> dict[str, float]:
    """Compiled in one graph, with a gate, without text."""
    runs = {
        "compiled": partial(method, "sta", backend="aot_eager"),
        "by this backend": partial(
            method, "flash", backend="sparseattn", text=0, options={"inner_backend": "aot_eager"}
        ),
        "gated": partial(method, "vsa", text=0, gated=True),
    }
    return {name: run(rank, ranks) for name, run in runs.items()}


CASES = {"every method": every_method, "other ways": other_ways}
