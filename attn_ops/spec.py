"""BackendSpec and Provider: what a backend offers and who computes it.

Both answer "why not?" with a list of sentences, never with False. The common requirements are data (`Support`), so a
backend states them once and every one of them gets the same sentence everywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch

from .call import FLOAT_DTYPES, AttentionCall, Params, ParamValue, dtype_name
from .capability import Capability, version_numbers
from .errors import ArgumentError, PolicyError, nearest
from .param import Param as Param
from .schedule import Schedule

Kernel = Callable[..., Any]
WhyNot = Callable[[AttentionCall, Capability], list[str]]


def no_reasons(_call: AttentionCall, _capability: Capability) -> list[str]:
    """The `why_not` of something that has no requirement beyond its `Support`."""
    return []


def without_fp8(call: AttentionCall, capability: Capability) -> list[str]:
    """The `why_not` of a GPU kernel whose `pv="fp8"` needs FP8 tensor cores."""
    if call.param("pv") == "fp8" and capability.sm is not None and not capability.fp8:
        return [f'pv="fp8" needs sm89 or newer, this is {capability}']
    return []


@dataclass(frozen=True)
class Support:
    """The requirements that most backends and providers share, as data.

    Args:
        dtypes: dtypes of q, k and v.
        head_dim: smallest and largest head_dim.
        causal: takes `causal`.
        window: takes a causal `window`.
        cross: takes Sq != Sk.
        causal_cross: takes `causal` with Sq != Sk (top-left).
        grad: gradients flow through it.
        layout: needs the token grid of a video.
        devices: device types.
        min_sm: least CUDA compute capability, or None.
        package: import name of the package it needs, or None.
        min_version: least version of that package.
    """

    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    head_dim: tuple[int, int] = (1, 256)
    causal: bool = True
    window: bool = False
    cross: bool = True
    causal_cross: bool = True
    grad: bool = True
    layout: bool = False
    devices: tuple[str, ...] | None = None
    min_sm: int | None = None
    package: str | None = None
    min_version: str | None = None

    def why_not(self, call: AttentionCall, capability: Capability) -> list[str]:
        """Every requirement that the call or the machine does not meet, one sentence each."""
        return [*self.why_not_on(capability), *self._call(call)]

    def why_not_on(self, capability: Capability) -> list[str]:
        """Every requirement that the machine does not meet, whatever the call."""
        reasons = []
        if self.devices is not None and capability.device not in self.devices:
            reasons.append(f"needs a {' or '.join(self.devices)} device, this is {capability.device}")
        if self.min_sm is not None and capability.device == "cuda" and (capability.sm or 0) < self.min_sm:
            reasons.append(f"needs sm{self.min_sm} or newer, this is {capability}")
        if self.package is not None and not capability.has(self.package):
            reasons.append(f"{self.package} is not installed")
        elif self.package is not None and self.min_version is not None:
            have = capability.version_of(self.package) or ()
            if have < version_numbers(self.min_version):
                reasons.append(f"needs {self.package} {self.min_version}, found {'.'.join(map(str, have))}")
        return reasons

    def _call(self, call: AttentionCall) -> list[str]:
        low, high = self.head_dim
        checks = (
            (call.barrier is not None, f"{call.barrier}"),
            (call.mask != "none", f"a {call.mask} mask is given and it takes none"),
            (call.dropout != 0.0, f"dropout {call.dropout:g} and it has none"),
            (call.dtype not in self.dtypes, f"dtype {dtype_name(call.dtype)}, not {' or '.join(self.dtype_names)}"),
            (not low <= call.head_dim <= high, f"head_dim {call.head_dim}, not {low} to {high}"),
            (call.value_dim not in (None, call.head_dim), f"value head_dim {call.value_dim} != {call.head_dim}"),
            (call.heads % call.kv_heads != 0, f"{call.heads} query heads are not a multiple of {call.kv_heads}"),
            (call.causal and not self.causal, "causal attention is not supported"),
            (call.window is not None and not self.window, f"sliding window of {call.window} is not supported"),
            (call.kind == "cross" and not self.cross, f"cross-attention: {call.seq_q} queries, {call.seq_k} keys"),
            (
                call.kind == "cross" and call.causal and self.cross and not self.causal_cross,
                f"causal with {call.seq_q} queries and {call.seq_k} keys (it aligns them bottom-right)",
            ),
            (call.needs_grad and not self.grad, "a gradient is needed and it has none"),
        )
        reasons = [sentence for wrong, sentence in checks if wrong]
        return [*reasons, *self._layout(call)] if self.layout else reasons

    def _layout(self, call: AttentionCall) -> list[str]:
        if call.layout is None:
            return ["the token grid is not known: give the rule layout = { grid = [T, H, W] }"]
        mismatches = dict.fromkeys(map(call.layout.mismatch, (call.seq_q, call.seq_k)))
        return [mismatch for mismatch in mismatches if mismatch is not None]

    @property
    def dtype_names(self) -> list[str]:
        """Names of the dtypes, for messages."""
        return [dtype_name(dtype) for dtype in self.dtypes]


_COMPLEMENT = {"keep_ratio": "sparsity", "sparsity": "keep_ratio"}

TRITON = Support(devices=("cuda",), min_sm=80, package="triton", min_version="3.6")
"""The requirements of our Triton kernels."""

TRITON_FORWARD = replace(TRITON, grad=False)
"""Those of our Triton kernels that have no backward."""


def later(module: str, name: str) -> Callable[[], Kernel]:
    """A loader that imports `sparseattn.attn_ops.<module>` when it is first asked and returns its function `name`."""

    def load() -> Kernel:
        kernel: Kernel = getattr(importlib.import_module(f".{module}", __package__), name)
        return kernel

    return load


@dataclass(frozen=True)
class Provider:
    """Who computes an op.

    Args:
        name: its name in the node, the policy and the report, e.g. "triton".
        summary: one line for `sparseattn backends`.
        load: imports what it needs and returns the forward kernel, called as the op without `provider`.
        load_backward: likewise the backward kernel, or None if it has none.
        support: its requirements.
        why_not: further requirements.
        install: the command that brings its package, or "".
        detail: loads a function that says in a line what serves it on this machine, for `sparseattn backends`.
        only_if_named: why no automatic choice takes it, or "" if one may.
    """

    name: str
    summary: str
    load: Callable[[], Kernel]
    load_backward: Callable[[], Kernel] | None = None
    support: Support = field(default_factory=Support)
    why_not: WhyNot = no_reasons
    install: str = ""
    detail: Callable[[], Callable[[], str]] | None = None
    only_if_named: str = ""

    def reasons(self, call: AttentionCall, capability: Capability) -> list[str]:
        """Why this provider cannot serve the call on the machine; empty if it can."""
        reasons = [*self.support.why_not(call, capability), *self.why_not(call, capability)]
        if call.needs_grad and self.support.grad and self.load_backward is None:
            reasons.append("a gradient is needed and it has no backward kernel")
        if self.install and self.support.package and not capability.has(self.support.package):
            reasons = [f"{r} ({self.install})" if r.endswith("is not installed") else r for r in reasons]
        return reasons


@dataclass(frozen=True)
class Prologue:
    """How an op on rounded tensors stands for one that rounds q and k itself, at a site that reads its output alone.

    Args:
        of: name of the backend it stands for.
        attend: computes what the op of that backend does, with the same arguments, from PyTorch's own operators and
            this op. Its trace takes the place of the site.
        why_not: why it cannot, for a call with the parameters of that backend.
        break_even: why it would not pay, or None.
    """

    of: str
    attend: Kernel
    why_not: WhyNot = no_reasons
    break_even: Callable[[AttentionCall, Capability], str | None] | None = None


@dataclass(frozen=True)
class BackendSpec:
    """What a backend offers. One object per file of `attn_ops/backends`, named BACKEND.

    Args:
        name: its name in policies and reports, e.g. "sage".
        op: name of its op in `torch.ops.sparseattn`, called as `op(q, k, v, *, causal, scale, provider, **params)`.
        kind: "exact", "quantized" or "sparse".
        summary: one line for `sparseattn backends`.
        paper: where the method is defined, or "".
        providers: who can compute it, best first. The last is the reference.
        params: what a rule may set.
        support: requirements whoever computes it.
        why_not: further requirements.
        break_even: why it would not pay here, or None; asked only of rules with `only_if_faster`.
        tolerance: typical relative error to dense attention, by dtype name or as "typical". The self-check allows three
            times as much.
        selectable: a policy may choose it (False for ops that need an argument no graph has, such as a block map).
        attached: the op's tensor arguments that the module around the attention may hand over: trained parameters.
        prologue: how this op, on rounded tensors, stands for that of another backend.
        integer_qk: q and k are rounded to INT8 before they are multiplied, so that they may come rounded.
    """

    name: str
    op: str
    kind: Literal["exact", "quantized", "sparse"]
    summary: str
    providers: tuple[Provider, ...]
    paper: str = ""
    params: tuple[Param, ...] = ()
    support: Support = field(default_factory=Support)
    why_not: WhyNot = no_reasons
    break_even: Callable[[AttentionCall, Capability], str | None] | None = None
    tolerance: Mapping[str, float] = field(default_factory=dict)
    selectable: bool = True
    attached: tuple[str, ...] = ()
    prologue: Prologue | None = None
    integer_qk: bool = False

    def reasons(self, call: AttentionCall, capability: Capability) -> list[str]:
        """Why this backend cannot serve the call, whoever computes it; empty if it can."""
        return [*self.support.why_not(call, capability), *self._per_head(call), *self.why_not(call, capability)]

    def _per_head(self, call: AttentionCall) -> list[str]:
        varying = {param.name for param in self.params if param.tensor and not isinstance(param.default, tuple)}
        return [
            f"{name} has {len(value)} values, one for each head, and there are {call.heads} heads"
            for name, given in call.params
            if name in varying
            for value in (given.extremes if isinstance(given, Schedule) else (given,))
            if isinstance(value, tuple) and len(value) != call.heads
        ]

    @property
    def param_names(self) -> set[str]:
        """What a rule may set: the parameters, and the complement of keep_ratio or sparsity."""
        names = {param.name for param in self.params}
        return names | {_COMPLEMENT[name] for name in names if name in _COMPLEMENT}

    def own(self, given: Params) -> Params:
        """Those of the given parameters that the backend has; keep_ratio and sparsity stand for one another."""
        known = {param.name for param in self.params}
        values = {}
        for name, value in given:
            other = _COMPLEMENT.get(name)
            if name in known:
                values[name] = value
            elif other in known:
                values[other] = _one_minus(value)
        return tuple(sorted(values.items()))

    def complete(self, given: Params) -> Params:
        """Every parameter of the backend: as given, else its default."""
        values = dict(self.own(given))
        return tuple((param.name, values.get(param.name, param.default)) for param in self.params)

    def provider(self, name: str) -> Provider:
        """The provider of that name.

        Raises:
            ArgumentError: if there is none; the message names the nearest.
        """
        for provider in self.providers:
            if provider.name == name:
                return provider
        hint = nearest(name, [provider.name for provider in self.providers])
        raise ArgumentError(self.op, "provider", "be one that it has", repr(name), hint)

    def check_params(self, params: Mapping[str, object], where: str) -> dict[str, ParamValue]:
        """The parameters, converted and checked against their ranges.

        Raises:
            PolicyError: on an unknown name, a wrong type or a value out of range.
        """
        for name in params:
            if name not in self.param_names:
                raise PolicyError(f"{where}: {self.name} has no parameter {name!r}. {nearest(name, self.param_names)}")
        return {name: self._param(name).check(value, where) for name, value in params.items()}

    def _param(self, name: str) -> Param:
        """The parameter of that name; of keep_ratio and sparsity, one made of the other."""
        known = {param.name: param for param in self.params}
        return known.get(name) or replace(known[_COMPLEMENT[name]], name=name, doc=f"1 - {_COMPLEMENT[name]}.")


def _one_minus(value: ParamValue) -> ParamValue:
    if isinstance(value, Schedule):
        return value.map(_one_minus_number)
    if isinstance(value, tuple):
        return tuple(map(_one_minus_number, value))
    return _one_minus_number(cast(float, value))


def _one_minus_number(value: float) -> float:
    return round(1 - value, 12)  # 1 - 0.9 is not 0.1 in binary, and a block would be lost
