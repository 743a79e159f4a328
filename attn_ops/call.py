"""AttentionCall: what is asked of attention at one place, as plain values.

It holds no tensor and no node, so every decision about it is a pure function and can be tested without a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .schedule import Schedule
from .video_layout import VideoLayout

ParamValue = bool | int | float | str | tuple[int, ...] | tuple[float, ...] | Schedule | None
Params = tuple[tuple[str, ParamValue], ...]
Kind = Literal["self", "cross"]
MaskKind = Literal["none", "bool", "float"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention, `softmax(scale * q @ k.T + mask) @ v`, described without its tensors.

    Sizes are numbers; a size that is symbolic in the graph is given by its hint and named in `dynamic`.

    Args:
        batch: B.
        heads: query heads, Hq.
        kv_heads: key and value heads, Hkv.
        seq_q: query tokens, Sq.
        seq_k: key tokens, Sk.
        head_dim: channels of a query or key head, D.
        dtype: dtype in which attention runs (after autocast).
        device: device type, "cpu" or "cuda".
        value_dim: channels of a value head; None means `head_dim`.
        causal: query i sees keys 0 ... i (top-left, as SDPA).
        window: with `causal`, query i sees keys i - window + 1 ... i; None means no window.
        mask: kind of the mask tensor, if one is given.
        dropout: dropout probability.
        scale: factor on the scores; None means `head_dim ** -0.5`.
        needs_grad: a gradient will be asked of the output.
        kind: "self" if query and key lengths are provably equal, else "cross".
        dynamic: names of the sizes that are symbolic.
        layout: where the video and text tokens lie, or None if it is not known.
        barrier: why no op of ours may stand here at all (a functorch transform, a DTensor), or None.
        params: (name, value) of every parameter of the backend that is asked; empty while none is.
    """

    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    value_dim: int | None = None
    causal: bool = False
    window: int | None = None
    mask: MaskKind = "none"
    dropout: float = 0.0
    scale: float | None = None
    needs_grad: bool = False
    kind: Kind = "self"
    dynamic: tuple[str, ...] = ()
    layout: VideoLayout | None = None
    barrier: str | None = None
    params: Params = ()

    def param(self, name: str) -> ParamValue | None:
        """The value of a parameter of the backend that is asked; None if it has none of that name."""
        return dict(self.params).get(name)

    @property
    def shape(self) -> str:
        """`1,8,4096,64`, or `1,8/2,4096x512,64` for grouped heads and cross lengths; a dynamic size has a `~`."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        batch, seq_q, seq_k = (self._size(name) for name in ("batch", "seq_q", "seq_k"))
        seq = seq_q if self.kind == "self" else f"{seq_q}x{seq_k}"
        return f"{batch},{heads},{seq},{self.head_dim}"

    def _size(self, name: str) -> str:
        return f"{'~' if name in self.dynamic else ''}{getattr(self, name)}"

    def __str__(self) -> str:
        parts = [f"{self.kind} ({self.shape})", dtype_name(self.dtype), self.device]
        if self.causal:
            parts.append("causal")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.mask != "none":
            parts.append(f"{self.mask} mask")
        if self.dropout:
            parts.append(f"dropout {self.dropout:g}")
        if self.scale is not None:
            parts.append(f"scale {self.scale:g}")
        if self.needs_grad:
            parts.append("needs grad")
        return ", ".join(parts)
