"""ContextParallel: the wish to compute a model on shards of its sequence, one on each rank of a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..attn_ops.errors import PolicyError
from .communication_model import Split

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Method = Literal["ulysses", "ring", "hybrid", "auto"]
Wire = Literal["exact", "int8"]


@dataclass(frozen=True)
class ContextParallel:
    """The option `parallel` of the backend: every rank of the mesh holds a shard of the sequence.

    Which tensors are shards is read from the graph, where `sparseattn.parallel.shard` or `shard_model` made them. A
    model that is given shards, and no whole tensor, does not show it: then say how many `tokens` there are in all, and
    every self-attention is taken to be over them.

    Args:
        mesh: a DeviceMesh of one dimension, or of two, (ring, ulysses); of a larger one take them, `mesh["cp"]`.
        method: "ulysses" splits attention by heads; "ring" passes keys and values from rank to rank, for exact
            attention and block_topk; "hybrid" does the first along the second dimension of the mesh, the second along
            the first; "auto" is "hybrid" on two dimensions, else "ulysses", and "ring" for fewer heads than ranks.
        tokens: tokens of the whole sequence, without text; None where the graph shows them.
        text_tokens: with `tokens`, tokens of text that every rank holds in the same sequence.
        text_first: with `tokens`, the text comes before the shard.
        wire: what queries and keys travel as: "exact", in their dtype, or "int8", with a scale for each token, to the
            sites of methods that round them to INT8 anyway. Then they are rounded twice.

    Raises:
        PolicyError: on a wrong type or size.
    """

    mesh: DeviceMesh
    method: Method = "auto"
    tokens: int | None = None
    text_tokens: int = 0
    text_first: bool = False
    wire: Wire = "exact"

    def __post_init__(self) -> None:
        dims = getattr(self.mesh, "ndim", None)
        if dims not in (1, 2):
            got = type(self.mesh).__name__ if dims is None else f"{dims} dimensions"
            raise PolicyError(
                f"parallel: mesh must be a DeviceMesh of one dimension, or of two (ring, ulysses), got {got}. "
                'Make it with torch.distributed.device_mesh.init_device_mesh, or take one: mesh["cp"].'
            )
        for name, choices in (("method", get_args(Method)), ("wire", get_args(Wire))):
            if getattr(self, name) not in choices:
                names, got = ", ".join(choices), getattr(self, name)
                raise PolicyError(f"parallel: {name} must be one of {names}, got {got!r}.")
        if self.method != "auto" and (self.method == "hybrid") != (dims == 2):
            raise PolicyError(
                f"parallel: method must be {'hybrid or auto' if dims == 2 else 'ulysses, ring or auto'} on a mesh of "
                f"{dims} dimension{'s' * (dims == 2)}, got {self.method!r}."
            )
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
        return rank_of(self.mesh)

    @property
    def group_rank(self) -> int:
        """The place of this rank among those that may split heads."""
        return int(self.mesh.get_local_rank(self.mesh.ndim - 1))

    @property
    def group(self) -> str:
        """Name of the process group of those."""
        return str(self.mesh.get_group(self.mesh.ndim - 1).group_name)

    @property
    def ring_rank(self) -> int:
        """The place of this rank in its ring."""
        return int(self.mesh.get_local_rank(0))

    @property
    def ring_group(self) -> str:
        """Name of the process group of the ring."""
        return str(self.mesh.get_group(0).group_name)

    def split(self, heads: int) -> Split:
        """How the ranks share an attention of so many query heads."""
        if self.mesh.ndim == 2:
            return Split(self.mesh.size(1), self.mesh.size(0))
        around = self.method == "ring" or (self.method == "auto" and heads < self.ranks)
        return Split(1, self.ranks) if around else Split(self.ranks, 1)


def rank_of(mesh: DeviceMesh) -> int:
    """The place of this rank among all of a mesh, in the order of its last dimension first."""
    rank = 0
    for dim in range(mesh.ndim):
        rank = rank * mesh.size(dim) + mesh.get_local_rank(dim)
    return int(rank)
