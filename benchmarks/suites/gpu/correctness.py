"""Is every provider right? Small shapes, forward and backward, to the reference in fp32.

The other cases ask `failure` before they time one of our providers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparseattn

from harness.case import Case
from harness.contest import reason
from harness.error import relative_l2
from harness.inputs import random_lists
from harness.record import Row
from suites.gpu.machine import why_not
from suites.gpu.workload import our_providers

NAME = "gpu.correctness"
GRID, TOKENS = (4, 16, 16), 1024
TOLERANCE = 2e-2
_QUANTIZED = ("sage", "sparge", "sage_sla")
_LAYOUT = {"grid": list(GRID)}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "block_topk": {"keep_ratio": 0.25},
    "sage": {},
    "sparge": {"keep_ratio": 0.25},
    "sla": {"keep_ratio": 0.25},
    "sage_sla": {"keep_ratio": 0.25},
    "vsa": {**_LAYOUT, "tile": [4, 4, 4], "sparsity": 0.75},
    "sta": {**_LAYOUT, "tile": [4, 4, 4], "window": [1, 3, 3]},
    "vmoba": {**_LAYOUT, "chunk": [2, 8, 8], "select": "topk", "topk": 3},
}
"""Arguments that every provider of a backend is tried with."""


@dataclass(frozen=True)
class Settings:
    """Seconds that it may take, and "cpu" to try the machinery with the CPU's provider."""

    seconds: float = 90.0
    device: str = "cuda"


def run(settings: Settings) -> Iterator[Row]:
    """A row for every backend and provider, with the errors or the reason."""
    for backend in ("block_sparse", *ARGUMENTS):
        for provider in our_providers(backend) if settings.device == "cuda" else ("cpu",):
            why = failure(backend, provider, settings.device)
            setting = {"backend": backend, "seq": TOKENS, "dtype": "bf16"}
            errors = {} if why else {**_errors(backend, provider, settings.device), "to": "reference, fp32"}
            yield Row(NAME, provider, setting, error=errors, missing=why or None)


@functools.cache
def failure(backend: str, provider: str, device: str) -> str:
    """Why the provider must not be timed; nothing if it is right."""
    try:
        errors = _errors(backend, provider, device)
    except Exception as error:  # any error of a kernel is the reason
        return reason(error)
    wrong = {name: value for name, value in errors.items() if not value <= TOLERANCE}  # so that NaN is wrong
    return ", ".join(f"wrong: {name} {value:.1e}, at most {TOLERANCE:g} is right" for name, value in wrong.items())


@functools.cache
def _errors(backend: str, provider: str, device: str) -> dict[str, float]:
    """Relative L2 errors of the output and, where there are gradients, of dq, dk and dv."""
    spec = sparseattn.backends()[backend]
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, TOKENS, 64, device=device).bfloat16() for _ in range(3)]
    grad = torch.randn(1, 2, TOKENS, 64, device=device).bfloat16()
    attend = _attention(backend, spec.op, device)
    trains = backend not in _QUANTIZED and next(p for p in spec.providers if p.name == provider).support.grad
    ours = _results(functools.partial(attend, provider=provider), inputs, grad, trains)
    # The definition computes in fp32 inside; its gradients of fp32 inputs have no rounding of ours.
    exact = _results(functools.partial(attend, provider="reference"), [x.float() for x in inputs], grad.float(), trains)
    names = ("relative_l2", "dq_relative_l2", "dk_relative_l2", "dv_relative_l2")
    return {name: relative_l2(a, b) for name, a, b in zip(names, ours, exact, strict=False)}


def _attention(backend: str, op: str, device: str) -> Callable[..., Tensor]:
    function = getattr(torch.ops.sparseattn, op)
    if backend != "block_sparse":
        return lambda q, k, v, provider: function(q, k, v, **ARGUMENTS[backend], provider=provider)[0]
    lists = random_lists(2, TOKENS, 64, density=0.25, device=device)
    sizes = {"block_q": 64, "block_k": 64}
    return lambda q, k, v, provider: function(q, k, v, lists.index, lists.count, **sizes, provider=provider)[0]


def _results(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, trains: bool) -> list[Tensor]:
    if not trains:
        with torch.no_grad():
            return [attend(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


CASE = Case(NAME, run, Settings(), Settings(device="cpu"), why_not)
