"""define_op: how every attention op becomes a `torch.ops.sparseattn.*` op.

One call gives an op its schema, device kernels, fakes, autograd, autocast and refusals. Every op is
`(q, k, v, ...) -> (out, lse)`: `out` like q, in q's stride order and v's dtype; `lse` fp32 (B, Hq, Sq), contiguous. Its
backward, where it has one, is `(grad_out, grad_lse, out, lse, q, k, v, ...) -> (grad_q, grad_k, grad_v, ...)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .errors import GradientError

NAMESPACE = "sparseattn"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
"""The registrations live as long as this object."""

_DEVICE_KEYS = ("CPU", "CUDA")
_AUTOCAST_DEVICES = ("cpu", "cuda")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset

Kernel = Callable[..., Any]

FORWARDS: dict[str, Kernel] = {}
"""The Python that every op runs, by the op's name: for whoever opens an op into the operators it is made of."""


def define_op(
    name: str,
    arguments: str,
    *,
    forward: Kernel,
    check: Kernel,
    backward: Kernel | None = None,
    refusal: str = "",
    differentiable: tuple[str, ...] = (),
) -> torch._ops.OpOverload:
    """Register `torch.ops.sparseattn.<name>` and, with `backward`, `<name>_backward`.

    Args:
        name: name of the op.
        arguments: its schema's arguments after `Tensor q, Tensor k, Tensor v`.
        forward: computes (out, lse); its signature repeats the schema's names and defaults, because the dispatcher
            drops arguments that equal them.
        check: raises ArgumentError on wrong arguments; same signature; must work on fake tensors.
        backward: computes the gradients from (grad_out, grad_lse or None, out, lse, *all forward arguments).
        refusal: without `backward`, the sentence to raise when a gradient is needed.
        differentiable: tensor arguments after q, k and v that have a gradient too, such as weights. The backward
            returns theirs after those of q, k and v, in this order: an empty tensor where the argument is None.
    """
    arguments = f"Tensor q, Tensor k, Tensor v, {arguments}"
    LIBRARY.define(f"{name}({arguments}) -> (Tensor out, Tensor lse)", tags=_TAGS)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    FORWARDS[name] = forward
    for key in _DEVICE_KEYS:
        LIBRARY.impl(name, forward, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake_forward(check), lib=LIBRARY)
    gradient = None if backward is None else _define_backward(name, arguments, backward, differentiable)
    LIBRARY.impl(name, _autograd_kernel(op, gradient, refusal, differentiable), "Autograd", with_keyset=True)
    for device in _AUTOCAST_DEVICES:
        kernel = _autocast_kernel(op, device, differentiable)
        LIBRARY.impl(name, kernel, f"Autocast{device.upper()}", with_keyset=True)
    return op


def _define_backward(
    name: str, arguments: str, backward: Kernel, differentiable: tuple[str, ...]
) -> torch._ops.OpOverload:
    forward, name = name, f"{name}_backward"
    plain = [argument.split("=")[0] for argument in arguments.split(", ") if argument != "*"]
    given = ", ".join(["Tensor grad_out", "Tensor? grad_lse", "Tensor out", "Tensor lse", *plain])
    grads = ", ".join(f"Tensor grad_{of}" for of in ("q", "k", "v", *differentiable))
    LIBRARY.define(f"{name}({given}) -> ({grads})", tags=_TAGS)
    for key in _DEVICE_KEYS:
        LIBRARY.impl(name, _outside_autocast(backward), key)
    names = [argument.split()[-1] for argument in plain]
    places = [names.index(of) for of in ("q", "k", "v", *differentiable)]
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake_backward(places), lib=LIBRARY)
    # Without a formula of its own, the gradient of the gradient would be silently wrong.
    torch.library.register_autograd(f"{NAMESPACE}::{name}", _double_backward_refusal(forward), lib=LIBRARY)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def _fake_forward(check: Kernel) -> Kernel:
    def fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        check(q, k, v, *args, **kwargs)
        return torch.empty_like(q, dtype=v.dtype), q.new_empty(q.shape[:-1], dtype=torch.float32)

    return fake


def _fake_backward(places: list[int]) -> Kernel:
    def fake(
        grad_out: Tensor, _grad_lse: Tensor | None, _out: Tensor, _lse: Tensor, *values: Any
    ) -> tuple[Tensor, ...]:
        given = [values[place] for place in places]
        return tuple(grad_out.new_empty(0) if value is None else torch.empty_like(value) for value in given)

    return fake


def _outside_autocast(kernel: Kernel) -> Kernel:
    """The kernel in the precision it is written for, also where `backward()` is called inside torch.autocast."""
    excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    excluded = excluded.add(torch._C.DispatchKey.AutocastCUDA)

    def outside(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return kernel(*args)

    return outside


def _double_backward_refusal(name: str) -> Kernel:
    def refuse(_ctx: Any, *_grads: Tensor) -> None:
        raise GradientError(f"{name}: double backward is not supported. Use torch's own attention where it is needed.")

    return refuse


def _autograd_kernel(
    op: torch._ops.OpOverload, gradient: torch._ops.OpOverload | None, refusal: str, differentiable: tuple[str, ...]
) -> Kernel:
    """An own kernel for the Autograd key: a third of the overhead of `register_autograd`, measured."""
    function = None if gradient is None else _autograd_function(op, gradient, differentiable)
    bind = _binder(op)
    given = _picker(op, differentiable)

    def kernel(keyset: torch._C.DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        tensors = [q, k, v, *given(args, kwargs)] if differentiable else (q, k, v)
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, *tensors)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            if function is None:
                raise GradientError(refusal)
            if torch._C._are_functorch_transforms_active():
                raise GradientError(f"{op}: torch.func transforms cannot differentiate it. Use torch.autograd.")
            return function.apply(keyset, *bind((q, k, v, *args), kwargs))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _BELOW_AUTOGRAD, q, k, v, *args, **kwargs)

    return kernel


def _autograd_function(
    op: torch._ops.OpOverload, gradient: torch._ops.OpOverload, differentiable: tuple[str, ...]
) -> type[torch.autograd.Function]:
    names = [argument.name for argument in op._schema.arguments]
    places = [names.index(name) for name in ("q", "k", "v", *differentiable)]
    positional = sum(not argument.kwarg_only for argument in op._schema.arguments)
    keywords = [argument.name for argument in op._schema.arguments if argument.kwarg_only]

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *values: Any) -> tuple[Tensor, Tensor]:
            ctx.set_materialize_grads(False)
            kwargs = dict(zip(keywords, values[positional:], strict=True))
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = op.redispatch(keyset & _BELOW_AUTOGRAD, *values[:positional], **kwargs)
            ctx.is_tensor = [isinstance(value, Tensor) for value in values]
            ctx.rest = [None if tensor else value for tensor, value in zip(ctx.is_tensor, values, strict=True)]
            ctx.save_for_backward(out, lse, *(value for value in values if isinstance(value, Tensor)))
            return out, lse

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
            out, lse, *tensors = ctx.saved_tensors
            saved = iter(tensors)
            values = [next(saved) if tensor else rest for tensor, rest in zip(ctx.is_tensor, ctx.rest, strict=True)]
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grads: list[Tensor | None] = [None] * len(values)
            for place, grad in zip(places, gradient(grad_out, grad_lse, out, lse, *values), strict=True):
                grads[place] = grad if ctx.is_tensor[place] else None
            return (None, *grads)

    return Attention


def _binder(op: torch._ops.OpOverload) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Any]]:
    """All arguments of a call in schema order, defaults filled in."""
    arguments = op._schema.arguments
    positional = [argument.default_value for argument in arguments if not argument.kwarg_only]
    keywords = [(argument.name, argument.default_value) for argument in arguments if argument.kwarg_only]

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return [*args, *positional[len(args) :], *(kwargs.get(name, default) for name, default in keywords)]

    return bind


def _picker(
    op: torch._ops.OpOverload, names: tuple[str, ...]
) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]:
    """The tensors among the arguments of these names, of a call's arguments after q, k and v."""
    order = [argument.name for argument in op._schema.arguments[3:]]
    places = [(name, order.index(name)) for name in names]

    def pick(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        values = (args[place] if place < len(args) else kwargs.get(name) for name, place in places)
        return [value for value in values if value is not None]

    return pick


def _refuse_tangents(op: torch._ops.OpOverload, *tensors: Tensor) -> None:
    """Forward-mode AD would silently give zero tangents."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise GradientError(f"{op}: forward-mode AD is not supported. Use reverse mode, or torch's own attention.")


def _autocast_kernel(op: torch._ops.OpOverload, device: str, differentiable: tuple[str, ...]) -> Kernel:
    """Cast q, k, v and the other differentiable tensors, and nothing else, to the autocast dtype."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    places = [[argument.name for argument in op._schema.arguments[3:]].index(name) for name in differentiable]

    def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64 and tensor.device.type == device
        return tensor.to(dtype) if eligible else tensor

    def kernel(_keyset: torch._C.DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        rest = [cast(value, dtype) if i in places and value is not None else value for i, value in enumerate(args)]
        given = {name: kwargs.pop(name) for name in differentiable if kwargs.get(name) is not None}
        kwargs |= {name: cast(value, dtype) for name, value in given.items()}
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(cast(q, dtype), cast(k, dtype), cast(v, dtype), *rest, **kwargs)

    return kernel


def same_defaults(op: torch._ops.OpOverload, kernel: Kernel) -> list[str]:
    """Names of the arguments whose default, or place, in `kernel` differs from the schema; empty if it repeats it."""
    given = inspect.signature(kernel).parameters
    wanted = {argument.name: argument for argument in op._schema.arguments}
    differing = set(given) ^ set(wanted)
    for name in set(given) & set(wanted):
        default = wanted[name].default_value if wanted[name].has_default_value() else inspect.Parameter.empty
        if given[name].default != (tuple(default) if isinstance(default, list) else default):
            differing.add(name)
    return sorted(differing)
