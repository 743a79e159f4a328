"""DTensor sharding of the ops: batch and heads may be split over a mesh, tokens and head_dim not.

Not imported with the package: torch.distributed.tensor takes seconds, and its table of rules belongs to all of torch.
A rule says which placements an op takes on one dimension of a mesh; torch combines them over all dimensions, and
redistributes inputs that have others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .blocks.chunk_choice import ChunkRule
from .blocks.sparge_arguments import BLOCK_MAP
from .errors import ArgumentError
from .op import FORWARDS, NAMESPACE

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

Placements = list["Placement | None"]
Rule = tuple[Placements, Placements]

_BATCH, _HEADS = 0, 1
_SHARED = ("key_sizes", "weight", "bias")
"""Tensors that all batches and heads share; every other has the batch and the heads in front, or is one of these:"""
_PER_HEAD = {"keep_ratios": 1, "masses": 1, "similarities": 1, "pv_thresholds": 1, "sparsities": 1, "windows": 3}
"""Name -> entries of each head, in a vector; what is shorter is for all heads."""


@functools.cache
def register_dtensor() -> None:
    """Teach torch.distributed.tensor the attention ops, forward and backward, for the rest of the process.

    With it `torch.ops.sparseattn.*` take DTensors. Batch and heads may be `Shard`; grouped heads only where the ranks
    divide the key and value heads, or there is one. Inputs that are split by tokens or head_dim are redistributed
    first: to attend to shards of a sequence without gathering it, use `ContextParallel`. Tensors that are given by
    keyword, such as `keep_ratios`, torch does not redistribute: give them `Replicate`, or split as q's heads are.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for op in _ops():
        register_sharding(op)(functools.partial(_rules, op))
        # The key of the cache of decisions that torch derives leaves out lists, floats, strings and tensors by keyword.
        arguments = op._schema.arguments
        first = next(place for place, given in enumerate(arguments) if not _is_tensor(given))
        keywords = [given.name for given in arguments if given.kwarg_only]
        known[op] = RuntimeSchemaInfo(first, keywords or None, needs_pytree=True)


def _ops() -> list[torch._ops.OpOverload]:
    """The attention ops, the backward of those that have one, and the op that makes block maps."""
    namespace = getattr(torch.ops, NAMESPACE)
    backwards = [f"{name}_backward" for name in FORWARDS]
    return [getattr(namespace, name).default for name in (*FORWARDS, *backwards, BLOCK_MAP) if hasattr(namespace, name)]


def _is_tensor(argument: torch.Argument) -> bool:
    return "Tensor" in str(argument.type)


def _rules(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> list[Rule]:
    """All placements that the op takes on one dimension of a mesh: of its results, and of its arguments."""
    names = [argument.name for argument in op._schema.arguments]
    call = _Call(op, dict(zip(names, args, strict=False)) | kwargs)
    ways = [call.replicated()]
    if call.splits_batch:
        ways.append(call.split(_BATCH))
    if call.splits_heads:
        ways.append(call.split(_HEADS))
    return ways[-1:] if call.must_split_heads else ways


@dataclass(frozen=True)
class _Call:
    """One call of an op on DTensors.

    Args:
        op: the op.
        given: its arguments by name, in the order they came; a DTensor is its spec.
    """

    op: torch._ops.OpOverload
    given: dict[str, Any]

    def replicated(self) -> Rule:
        """Everything on every rank."""
        from torch.distributed.tensor import Replicate

        results: Placements = [Replicate() for _ in self.op._schema.returns]
        return results, [Replicate() if _is_spec(value) else None for value in self.given.values()]

    def split(self, dim: int) -> Rule:
        """Batch or heads on the ranks."""
        arguments = {name: self._placed(name, value, dim) for name, value in self.given.items()}
        return [self._result(result.name or "", dim) for result in self.op._schema.returns], list(arguments.values())

    @property
    def splits_batch(self) -> bool:
        """Whether an entry of the batch does not look at others."""
        return not self._competes_over(_BATCH)

    @property
    def splits_heads(self) -> bool:
        """Whether a part of the heads gives what they give among all, with the same arguments."""
        heads, kv_heads = self.given["q"].shape[1], self.given["k"].shape[1]
        listed = self.given.get("window")
        own_windows = isinstance(listed, Sequence) and len(listed) > _PER_HEAD["windows"]
        whole = any(_is_whole(self.given[name]) for name in self._per_head_keywords)
        aligned = kv_heads in (1, heads) or _divided(kv_heads, self.given["q"].mesh.shape)
        return aligned and not own_windows and not whole and not self._competes_over(_HEADS)

    @property
    def must_split_heads(self) -> bool:
        """Whether a tensor for each head is split, which torch does not redistribute.

        Raises:
            ArgumentError: if it cannot be known how q's heads must be split then.
        """
        for name in self._per_head_keywords:
            spec = self.given[name]
            if _is_whole(spec):
                continue
            if spec.mesh.ndim > 1 or not self.splits_heads:
                must = "be Replicate where heads cannot be split, and on a mesh of several dimensions"
                raise ArgumentError(self.op._opname, name, must, spec.placements, "Use .redistribute(placements=...).")
            return True
        return False

    @property
    def _per_head_keywords(self) -> list[str]:
        """The tensors with entries for each head that were given by keyword."""
        keywords = [argument.name for argument in self.op._schema.arguments if argument.kwarg_only]
        return [name for name in keywords if name in _PER_HEAD and self._has_heads(name)]

    def _has_heads(self, name: str) -> bool:
        """Whether a tensor of _PER_HEAD has entries for each head: one head's are as good for all."""
        spec: Any = self.given.get(name)
        return _is_spec(spec) and len(spec.shape) == 1 and spec.shape[0] > _PER_HEAD[name]

    def _competes_over(self, dim: int) -> bool:
        """Whether the op chooses among what several entries of a dimension would look at: VMoBA may."""
        names = ("select", "topk", "threshold", "threshold_type", "compat")
        if "threshold_type" not in {argument.name for argument in self.op._schema.arguments}:
            return False
        defaults: dict[str, Any] = {
            argument.name: argument.default_value for argument in _forward_of(self.op)._schema.arguments
        }
        return dim in ChunkRule(*(self.given.get(name, defaults[name]) for name in names)).inside

    def _placed(self, name: str, value: Any, dim: int) -> Placement | None:
        from torch.distributed.tensor import Replicate, Shard

        if not _is_spec(value):
            return None
        if name in _PER_HEAD:
            return Shard(0) if dim == _HEADS and self._has_heads(name) else Replicate()
        return Replicate() if self._is_shared(name, dim) else Shard(dim)

    def _result(self, name: str, dim: int) -> Placement:
        from torch.distributed.tensor import Partial, Replicate, Shard

        of = name.removeprefix("grad_")
        if of in self.given and not _is_spec(self.given[of]):
            return Replicate()  # an empty tensor, for no argument
        return Partial() if of in self.given and self._is_shared(of, dim) else Shard(dim)

    def _is_shared(self, name: str, dim: int) -> bool:
        """Whether all entries of a dimension look at the whole tensor, and its gradient is the sum of theirs."""
        return name in _SHARED or self.given[name].shape[dim] == 1 != self.given["q"].shape[dim]


def _forward_of(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    found: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), op._opname.removesuffix("_backward")).default
    return found


def _is_spec(value: Any) -> bool:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    return isinstance(value, DTensorSpec)


def _is_whole(spec: Any) -> bool:
    return all(placement.is_replicate() for placement in spec.placements)


def _divided(kv_heads: int, mesh: Sequence[int]) -> bool:
    """Whether every split of so many heads over dimensions of a mesh gives all ranks as many: groups stay together."""
    sizes = [size for size in mesh if size > 1]
    ways = itertools.chain.from_iterable(itertools.combinations(sizes, count) for count in range(1, len(sizes) + 1))
    return all(kv_heads % math.prod(way) == 0 for way in ways if math.prod(way) <= kv_heads)
