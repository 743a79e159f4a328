"""Decision: what was chosen for one site, by which rule, and why every other candidate was not. Plain values only."""

from __future__ import annotations

from dataclasses import dataclass

from ..attn_ops.call import Params
from ..attn_ops.registry import backend
from ..attn_ops.video_layout import VideoLayout

Rejection = tuple[str, tuple[str, ...]]
"""A candidate, "sage" or "sage/triton", and its reasons."""


@dataclass(frozen=True)
class Decision:
    """The choice for one site.

    Args:
        backend: name of the backend, or None to leave the site dense.
        provider: name of the provider that computes it, or None with no backend.
        params: the parameters that the rule sets, as sorted (name, value) pairs; the others keep the op's defaults.
        layout: where the video and text tokens lie, for a backend that needs it.
        rule: number of the rule that decided, from 1; None if no rule matched.
        rule_text: that rule in one line.
        why: the choice in a sentence or two.
        rejected: every candidate that was not chosen, with its reasons: first those of the rule, in its order.
    """

    backend: str | None = None
    provider: str | None = None
    params: Params = ()
    layout: VideoLayout | None = None
    rule: int | None = None
    rule_text: str = ""
    why: str = ""
    rejected: tuple[Rejection, ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether the site stays SDPA."""
        return self.backend is None

    @property
    def op(self) -> str:
        """Name of the op at the site: one of `torch.ops.sparseattn`, or torch's own where it stays dense."""
        return "scaled_dot_product_attention" if self.backend is None else backend(self.backend).op
