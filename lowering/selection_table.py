"""The table of automatic choices: which backend and provider every machine gets, and why. Generated from the registry.

Decisions need no device, so one machine can print the choices of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..attn_ops.call import AttentionCall
from ..attn_ops.capability import Capability
from ..attn_ops.registry import backends
from ..attn_ops.video_layout import VideoLayout
from .decide import decide
from .decision import Decision
from .policy import Policy
from .presets import PRESETS
from .rule import Rule

MACHINES = ("cpu-avx512", "sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121")
VENDORS = {
    "triton": "3.6",
    "flash_attn": "2.8.4",
    "sageattention": "2.2.0",
    "spas_sage_attn": "0.1.0",
    "fastvideo_kernel": "0.3.2",
}
"""Every optional package, at the version whose behaviour our adapters are written for."""

_GRID = (21, 30, 52)
_CALL = AttentionCall(1, 12, 12, 32760, 32760, 128, dtype=torch.bfloat16, layout=VideoLayout(_GRID))


def selection_page() -> str:
    """The page docs/selection.md: choices without and with the vendors' packages."""
    parts = [
        "# Which backend runs where",
        f"Chosen for self-attention of {_CALL.seq_q} tokens in bf16, {_CALL.heads} heads of {_CALL.head_dim} channels, "
        f"on a {'x'.join(map(str, _GRID))} grid, without gradients. Generated from the registry by "
        "`sparseattn backends --markdown`; a test keeps it true. `sparseattn backends` and the report of every compile "
        "say the same for your machine and your model.",
        "## With Triton alone",
        _tables({"triton": VENDORS["triton"]}),
        "## With every optional package",
        "Installed: " + ", ".join(f"{name} {version}" for name, version in VENDORS.items()) + ".",
        _tables(VENDORS),
    ]
    return "\n\n".join(parts) + "\n"


@dataclass
class _Notes:
    """Numbered reasons; one that comes again keeps its number."""

    numbers: dict[str, int] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        number = self.numbers.setdefault(text, len(self.numbers) + 1)
        return f"({number})"

    def lines(self) -> Iterator[str]:
        for text, number in self.numbers.items():
            yield f"{number}. {text}"


def _tables(packages: Mapping[str, str]) -> str:
    machines = [_machine(name, packages) for name in MACHINES]
    notes = _Notes()
    chosen = [[str(machine), *(_preset_cell(name, machine, notes) for name in PRESETS)] for machine in machines]
    names = sorted(name for name, spec in backends().items() if spec.selectable)
    asked = [[str(machine), *(_backend_cell(name, machine, notes) for name in names)] for machine in machines]
    return "\n\n".join(
        [
            "What the presets choose:",
            _markdown(["machine", *(f"`{name}`" for name in PRESETS)], chosen),
            "Who computes a backend that a rule asks for:",
            _markdown(["machine", *(f"`{name}`" for name in names)], asked),
            "Notes:",
            "\n".join(notes.lines()),
        ]
    )


def _machine(name: str, packages: Mapping[str, str]) -> Capability:
    return Capability.of(name) if name.startswith("cpu") else Capability.of(name, packages)


def _decide(policy: Policy, machine: Capability) -> Decision:
    dtype = torch.float32 if machine.device == "cpu" else torch.bfloat16
    call = AttentionCall(
        *(_CALL.batch, _CALL.heads, _CALL.kv_heads, _CALL.seq_q, _CALL.seq_k, _CALL.head_dim),
        dtype=dtype,
        device=machine.device,
        layout=_CALL.layout,
    )
    return decide(call, machine, policy)


def _preset_cell(name: str, machine: Capability, notes: _Notes) -> str:
    decision = _decide(Policy.preset(name), machine)
    return f"{_name(decision)} {notes.mark(decision.why)}"


def _backend_cell(name: str, machine: Capability, notes: _Notes) -> str:
    decision = _decide(Policy([Rule(name)]), machine)
    if decision.is_dense:
        return f"- {notes.mark(decision.why.removeprefix('rule 1 '))}"
    passed = [f"{label}: {', '.join(why)}" for label, why in decision.rejected if label.startswith(f"{name}/")]
    better = [reason for reason in passed if not reason.startswith(f"{name}/reference")]
    return f"{decision.provider} {notes.mark('; '.join(better))}" if better else f"{decision.provider}"


def _name(decision: Decision) -> str:
    return "dense" if decision.is_dense else f"{decision.backend}/{decision.provider}"


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
