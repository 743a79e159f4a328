"""ContextParallel: the wish to compute a model on shards of its sequence, one on each rank of a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..attn_ops.errors import PolicyError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Method = Literal["ulysses", "ring", "auto"]


@dataclass(frozen=True)
class ContextParallel:
    """The option `parallel` of the backend: every rank of the mesh holds a shard of the sequence.

    Which tensors are shards is read from the graph, where `sparseattn.parallel.shard` or `shard_model` made them. A
    model that is given shards, and no whole tensor, does not show it: then say how many `tokens` there are in all, and
    every self-attention is taken to be over them.

    Args:
        mesh: a one-dimensional DeviceMesh; of a larger one take the dimension, `mesh["cp"]`.
        method: "ulysses" splits attention by heads; "ring" passes keys and values from rank to rank, for exact
            attention; "auto" is "ulysses", and "ring" where there are fewer heads than ranks.
        tokens: tokens of the whole sequence, without text; None where the graph shows them.
        text_tokens: with `tokens`, tokens of text that every rank holds in the same sequence.
        text_first: with `tokens`, the text comes before the shard.

    Raises:
        PolicyError: on a wrong type or size.
    """

    mesh: DeviceMesh
    method: Method = "auto"
    tokens: int | None = None
    text_tokens: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        dims = getattr(self.mesh, "ndim", None)
        if dims != 1:
            got = type(self.mesh).__name__ if dims is None else f"{dims} dimensions"
            raise PolicyError(
                f"parallel: mesh must be a DeviceMesh of one dimension, got {got}. "
                'Make it with torch.distributed.device_mesh.init_device_mesh, or take one: mesh["cp"].'
            )
        if self.method not in get_args(Method):
            names = ", ".join(get_args(Method))
            raise PolicyError(f"parallel: method must be one of {names}, got {self.method!r}.")
        if self.tokens is not None and (type(self.tokens) is not int or self.tokens < 1):
            raise PolicyError(f"parallel: tokens must be an int of at least 1, got {self.tokens!r}.")
        if type(self.text_tokens) is not int or self.text_tokens < 0:
            raise PolicyError(f"parallel: text_tokens must be an int of at least 0, got {self.text_tokens!r}.")
        if self.tokens is None and (self.text_tokens or self.text_first):
            raise PolicyError("parallel: text_tokens and text_first must come with tokens. The graph shows them else.")

    @property
    def ranks(self) -> int:
        """Ranks that share the sequence."""
        return int(self.mesh.size())

    @property
    def rank(self) -> int:
        """The place of this one among them."""
        return int(self.mesh.get_local_rank())

    @property
    def group(self) -> str:
        """Name of their process group."""
        return str(self.mesh.get_group().group_name)
