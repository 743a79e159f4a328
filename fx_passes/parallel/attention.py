"""LocalAttention and DistributedAttention: an op as a module on (B, S, H, D), for models written against FastVideo's.

    attn = parallel.DistributedAttention(num_heads=24, head_size=128, mesh=mesh, method="sta", grid=(30, 48, 80))
    out, text = attn(q, k, v, original_seq_len, text_q, text_k, text_v, freqs_cis=(cos, sin))

The call is FastVideo's, so that of a ported model only the constructors change. Both are plain functions of tensors
with functional collectives: they run eagerly, and compile into the graph around them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...attn_ops.errors import ArgumentError, nearest
from ...attn_ops.registry import backend
from ...lowering.context_parallel import ContextParallel
from ...lowering.head_split import HeadSplit
from ...nn.attached import SlaProjection
from .ulysses import Piece, Ulysses

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Rotation = tuple[Tensor, Tensor]


class _OneOp(nn.Module):
    """One attention op with its parameters."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None,
        softmax_scale: float | None,
        causal: bool,
        method: str,
        params: dict[str, Any],
    ) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.softmax_scale = head_size**-0.5 if softmax_scale is None else softmax_scale
        self.causal, self.method = causal, method
        spec = backend(method, type(self).__name__)
        self._op: torch._ops.OpOverload = getattr(torch.ops.sparseattn, spec.op).default
        given = {**params, "scale": self.softmax_scale} | ({"causal": True} if causal else {})
        self._refuse_unknown(given)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        self._params = {name: value for name, value in given.items() if name not in tensors}
        self._tensors = tuple(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=False)
        # The place of the published module's projection: its state dict loads.
        self.attn_impl = SlaProjection(head_size, dtype=torch.float32) if "weight" in spec.attached else None

    def extra_repr(self) -> str:
        """What it computes."""
        return f"{self.method}, num_heads={self.num_heads}, head_size={self.head_size}"

    def _refuse_unknown(self, given: dict[str, Any]) -> None:
        arguments = self._op._schema.arguments
        if needed := [of.name for of in arguments[3:] if not of.kwarg_only and not of.has_default_value()]:
            raise ArgumentError(
                *(type(self).__name__, "method", "need nothing beside q, k and v", repr(self.method)),
                f"Call the op with its {', '.join(needed)}.",
            )
        known = [argument.name for argument in arguments if argument.kwarg_only or argument.name == "sparsities"]
        for name in given:
            if name not in known:
                raise ArgumentError(
                    type(self).__name__, name, f"be a parameter of {self.method}", "it", nearest(name, known)
                )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        """Attention of q: (B, Hq, S, D) to k, v: (B, Hkv, S, D)."""
        given = {**self._params, **{name: getattr(self, name) for name in self._tensors}}
        if gate is not None:
            given["gate"] = gate
        if self.attn_impl is not None:
            given |= dict(zip(self.attn_impl.names, self.attn_impl.tensors(q), strict=True))
        out: Tensor = self._op(q, k, v, **given)[0]
        return out

    def _check(self, tensors: dict[str, Tensor | None]) -> None:
        """Raises ArgumentError unless all that are given are (B, S, H, D) with the heads and head_dim of the module."""
        for name, tensor in tensors.items():
            heads = self.num_kv_heads if name[-1] in "kv" else self.num_heads
            if tensor is not None and (tensor.dim() != 4 or tensor.shape[2:] != (heads, self.head_size)):
                must = f"be (batch, tokens, {heads}, {self.head_size})"
                raise ArgumentError(type(self).__name__, name, must, tuple(tensor.shape))
        if tensors["gate_compress"] is not None and self.method != "vsa":
            raise ArgumentError(type(self).__name__, "gate_compress", "be None but for vsa", "one", "Leave it out.")


class LocalAttention(_OneOp):
    """One of the attention ops on the tokens of this rank, as FastVideo's module of that name.

    Args:
        num_heads: query heads.
        head_size: channels of a head, D.
        num_kv_heads: key and value heads; None means as many as query heads.
        softmax_scale: factor on the scores; None means D ** -0.5.
        causal: query i sees keys 0 ... i.
        method: which op, by the name that policies use: "flash", "sage", "vsa", "sta", ...
        params: the op's own parameters, such as grid=(T, H, W) or keep_ratio.

    "sla" and "sage_sla" have a projection, `attn_impl.proj_l`, zero until it is trained or loaded.

    Raises:
        PolicyError: for an unknown method.
        ArgumentError: for a parameter that the op has not.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        *,
        method: str = "flash",
        **params: Any,
    ) -> None:
        super().__init__(num_heads, head_size, num_kv_heads, softmax_scale, causal, method, params)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freqs_cis: Rotation | None = None,
        gate_compress: Tensor | None = None,
    ) -> Tensor:
        """Attention of all tokens of q: (B, S, Hq, D) to k, v: (B, Sk, Hkv, D).

        Args:
            q: queries.
            k: keys.
            v: values.
            freqs_cis: (cos, sin), each (S, D / 2), to rotate neighbouring channels of q and k by.
            gate_compress: (B, S, Hq, D), the gate of "vsa".

        Returns:
            (B, S, Hq, D).
        """
        self._check({"q": q, "k": k, "v": v, "gate_compress": gate_compress})
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if freqs_cis is not None:
            q, k = _rotated(q, freqs_cis), _rotated(k, freqs_cis)
        gate = None if gate_compress is None else gate_compress.transpose(1, 2)
        return self._attend(q, k, v, gate).transpose(1, 2)


class DistributedAttention(_OneOp):
    """One of the attention ops over all tokens of a sequence that ranks share, as FastVideo's module of that name.

    One all-to-all takes q, k, v (and the gate) from all heads of a part of the tokens to a part of the heads of all
    tokens, another takes the output back: Ulysses. Both have gradients; average those of parameters over the ranks.

    Args:
        num_heads: query heads, at least as many as ranks; all of them, as for one rank.
        head_size: channels of a head, D.
        num_kv_heads: key and value heads; None means as many as query heads.
        softmax_scale: factor on the scores; None means D ** -0.5.
        causal: query i sees keys 0 ... i of the whole sequence.
        mesh: a DeviceMesh of one dimension, whose ranks share the sequence. FastVideo has one for a process.
        method: which op, as for `LocalAttention`.
        params: the op's own parameters, for the whole sequence and all heads: each rank takes those of its heads.

    Raises:
        PolicyError: for an unknown method, or a mesh of several dimensions.
        ParallelError: if there are fewer query heads than ranks.
        ArgumentError: for a parameter that the op has not.

    Paper: https://arxiv.org/abs/2309.14509.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        *,
        mesh: DeviceMesh,
        method: str = "flash",
        **params: Any,
    ) -> None:
        shared = ContextParallel(mesh, method="ulysses")
        split = HeadSplit.of(num_heads, num_kv_heads or num_heads, shared.ranks)
        own = _of_rank(split, shared.rank, method, params)
        super().__init__(num_heads, head_size, num_kv_heads, softmax_scale, causal, method, own)
        self._heads, self._rank, self._group = split, shared.rank, shared.group

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        original_seq_len: int | None = None,
        replicated_q: Tensor | None = None,
        replicated_k: Tensor | None = None,
        replicated_v: Tensor | None = None,
        freqs_cis: Rotation | None = None,
        gate_compress: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over the tokens of all ranks, and after them those that every rank holds.

        Args:
            q: (B, L, Hq, D), this rank's tokens; the same L on every rank, the last ones padded.
            k: (B, L, Hkv, D).
            v: (B, L, Hkv, D).
            original_seq_len: tokens of the whole sequence, without padding; None where there is none.
            replicated_q: (B, T, Hq, D) of text, the same on every rank, or None.
            replicated_k: (B, T, Hkv, D).
            replicated_v: (B, T, Hkv, D).
            freqs_cis: (cos, sin), each (original_seq_len, D / 2), of the whole sequence, to rotate neighbouring
                channels of q and k by; text is not rotated.
            gate_compress: (B, L, Hq, D), the gate of "vsa"; not with replicated tokens.

        Returns:
            out: (B, L, Hq, D), zero for padding.
            replicated_out: (B, T, Hq, D), the same on every rank, or None.

        Raises:
            ArgumentError: on wrong shapes. What differs between ranks is not compared.
        """
        replicated = (replicated_q, replicated_k, replicated_v)
        names = ("replicated_q", "replicated_k", "replicated_v")
        tensors = {"q": q, "k": k, "v": v, "gate_compress": gate_compress}
        self._check({**tensors, **dict(zip(names, replicated, strict=True))})
        self._check_tokens(tensors, replicated)
        exchange = self._exchange(q.shape[1], original_seq_len, replicated_q)
        gates = [] if gate_compress is None else [gate_compress.transpose(1, 2)]
        q, k, v = (_joint(own, text) for own, text in zip((q, k, v), replicated, strict=True))
        q, k, v, *gates = exchange.to_heads(q, k, v, *gates)
        if freqs_cis is not None:
            q, k = _rotated(q, freqs_cis), _rotated(k, freqs_cis)
        out = exchange.to_tokens(self._attend(q, k, v, gates[0] if gates else None)).transpose(1, 2)
        if replicated_q is None:
            return out, None
        parts = out.split([piece.local for piece in exchange.pieces], dim=1)
        return parts[0], parts[1]

    def _exchange(self, local: int, whole: int | None, text: Tensor | None) -> Ulysses:
        most = local * self._heads.ranks
        whole = most if whole is None else whole
        if not 0 < whole <= most:
            must = f"be in 1 ... {most}, the tokens of all ranks"
            raise ArgumentError("DistributedAttention", "original_seq_len", must, whole)
        words = [] if text is None else [Piece(text.shape[1], text.shape[1], sharded=False)]
        return Ulysses((Piece(local, whole, sharded=True), *words), self._heads, self._rank, self._group)

    def _check_tokens(self, tensors: dict[str, Tensor | None], replicated: tuple[Tensor | None, ...]) -> None:
        lengths = {name: tensor.shape[1] for name, tensor in tensors.items() if tensor is not None}
        if len(set(lengths.values())) > 1:
            fix = "Use LocalAttention where keys are on every rank."
            raise ArgumentError("DistributedAttention", "k, v", "have q's tokens", lengths, fix)
        words = {None if text is None else text.shape[1] for text in replicated}
        if len(words) > 1:
            must = "be given for q, k and v, with as many tokens, or for none"
            raise ArgumentError("DistributedAttention", "replicated_k", must, sorted(map(str, words)))
        if words != {None} and tensors["gate_compress"] is not None:
            must = "be None with replicated tokens, which have no gate"
            raise ArgumentError("DistributedAttention", "gate_compress", must, "one", "Leave the gate out.")


def _of_rank(split: HeadSplit, rank: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters for this rank's heads: another value only where every head has its own."""
    each: dict[str, int] = {}
    for param in backend(method, "DistributedAttention").params:
        size = len(param.default) if isinstance(param.default, tuple) else 1
        each |= {name: size for name in (param.name if param.repeats else "", param.tensor) if name}
    found = dict(params)
    for name, value in params.items():
        listed = value.dim() == 1 if isinstance(value, Tensor) else isinstance(value, list | tuple)
        if name in each and listed and len(value) == each[name] * split.heads > each[name]:
            places = split.of_rank(rank, tuple(range(len(value))))
            found[name] = value[list(places)] if isinstance(value, Tensor) else [value[place] for place in places]
    return found


def _joint(own: Tensor, text: Tensor | None) -> Tensor:
    """(B, L, H, D) and (B, T, H, D) to (B, H, L + T, D)."""
    return (own if text is None else torch.cat([own, text], dim=1)).transpose(1, 2)


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """The first S tokens of x: (B, H, S or more, D), channels 2 i and 2 i + 1 rotated by angle i of (S, D / 2)."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    own, rest = x.split([cos.shape[0], x.shape[2] - cos.shape[0]], dim=2)
    even, odd = own[..., ::2], own[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=2)
