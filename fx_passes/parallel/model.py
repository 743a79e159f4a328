"""shard_model: split the tokens of an unmodified model where its plan says, by hooks that Dynamo traces.

sharded = shard_model(model, mesh)      # every rank computes its part of the tokens
sharded.remove()                        # and the whole again
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...attn_ops.errors import ParallelError
from ...attn_ops.sharding import WHOLE_MASK
from .plans import Gather, Mask, Plan, Split, matches, plan_of
from .tensors import gather, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Sharded:
    """A model whose tokens are split; `remove()`, or the end of a `with` block, ends that."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks away again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Sharded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def shard_model(model: nn.Module, mesh: DeviceMesh, plan: Plan | None = None) -> Sharded:
    """Have every rank compute its part of a model's tokens, between where the plan splits and where it gathers.

    The model takes whole inputs and gives whole outputs, the same on all ranks. It must be compiled with the option
    `parallel` and the same mesh: uncompiled, attention would see the tokens of one rank.

    Args:
        model: not compiled yet, or compiled with `model.compile`.
        mesh: a DeviceMesh of one dimension, or of two, (ring, ulysses).
        plan: where; None for the one that is known for the model's class.

    Raises:
        ParallelError: if no plan is known, or it names what the model has not.
    """
    plan = plan_of(model) if plan is None else plan
    size = _Size()
    handles: list[RemovableHandle] = []
    for glob, entry in plan.items():
        modules = [module for path, module in model.named_modules() if matches(glob, path)]
        if not modules:
            raise ParallelError(f"shard_model: the plan names {glob!r}, and {type(model).__name__} has no such module.")
        for module in modules:
            if isinstance(entry, Gather):
                handles.append(module.register_forward_hook(_gathers(mesh, entry.dim, size)))
            else:
                handles += _hooks(module, entry, mesh, size)
    return Sharded(handles)


class _Size:
    """How many tokens were split last."""

    def __init__(self) -> None:
        self.tokens = 0

    def see(self, value: Any, what: Split) -> None:
        """Remember the tokens of a tensor that is split."""
        if isinstance(value, Tensor) and what.applies(value) and value.shape[what.dim] != self.tokens:
            self.tokens = value.shape[what.dim]  # only what is new: inside a checkpoint nothing may be written


def _hooks(
    module: nn.Module, entry: Mapping[str | int, Split | Mask], mesh: DeviceMesh, size: _Size
) -> list[RemovableHandle]:
    names = list(inspect.signature(module.forward).parameters)
    arguments = {name: what for name, what in entry.items() if isinstance(name, str)}
    results = {place: what for place, what in entry.items() if isinstance(place, int)}
    if unknown := [name for name in arguments if name not in names]:
        raise ParallelError(f"shard_model: {type(module).__name__} must have the argument {unknown[0]!r} of the plan.")
    handles = []
    if arguments:
        hook = _splits_arguments(names, arguments, mesh, size)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    if results:
        handles.append(module.register_forward_hook(_splits_results(results, mesh, size)))
    return handles


def _splits_arguments(
    names: list[str], wanted: Mapping[str, Split | Mask], mesh: DeviceMesh, size: _Size
) -> Callable[..., Any]:
    """A forward pre-hook."""
    masks_last = sorted(wanted, key=lambda name: isinstance(wanted[name], Mask))

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in masks_last:
            what, value = wanted[name], given.get(name)
            if value is None:
                continue
            if isinstance(what, Mask):
                tokens = [given[other] for other in what.tokens if given.get(other) is not None]
                given[name] = WHOLE_MASK(value, sum(tensor.shape[1] for tensor in tokens))
            else:
                size.see(value, what)
                given[name] = _split(value, what, mesh)
        return tuple(given[name] for name in names[: len(args)]), {name: given[name] for name in kwargs}

    return hook


def _splits_results(wanted: Mapping[int, Split | Mask], mesh: DeviceMesh, size: _Size) -> Callable[..., Any]:
    """A forward hook of a module that gives several tensors, or one as its result 0."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> Any:
        single = isinstance(result, Tensor)
        parts = [result] if single else list(result)
        for place, what in wanted.items():
            if isinstance(what, Split):
                size.see(parts[place], what)
                parts[place] = _split(parts[place], what, mesh)
        return parts[0] if single else tuple(parts)

    return hook


def _gathers(mesh: DeviceMesh, dim: int, size: _Size) -> Callable[..., Any]:
    """A forward hook."""

    def hook(_module: nn.Module, _args: tuple[Any, ...], result: Tensor) -> Tensor:
        return gather(result, mesh, dim, size.tokens)

    return hook


def _split(value: Any, what: Split, mesh: DeviceMesh) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_split(one, what, mesh) for one in value)
    return shard(value, mesh, what.dim) if what.applies(value) else value
