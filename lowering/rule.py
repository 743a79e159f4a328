"""Rule: for which sites, which backends, how strongly.

A rule is checked when it is made: one that no call could ever satisfy is an error then, not a silent dense site later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch

from ..attn_ops.call import AttentionCall, Kind, Params, ParamValue, dtype_name
from ..attn_ops.schedule import Schedule
from ..attn_ops.step_range import Step, StepRange
from ..attn_ops.video_layout import VideoLayout
from .rule_checks import DENSE, check_rule, specs_of
from .rule_fields import as_choice, as_dtypes, as_flag, as_integer, as_names, as_params, as_sizes, as_text

Mode = Literal["prefer", "require", "never"]

_LISTS = ("use", "modules", "head_dim", "dtype")
"""Fields that a user may write as one value or a list."""


@dataclass(frozen=True, init=False, slots=True)
class Rule:
    """One rule of a policy. The first `prefer` or `require` rule that matches a site decides it.

    Args:
        use: names of backends in order of preference, as a str (commas allowed) or a list. "dense" leaves SDPA as it is
            and may only come last.
        modules: globs on the module path of the site, such as "blocks.*.attn1"; any may match. `*` also matches dots.
        kind: "self" or "cross"; None matches both.
        min_seq: least length, in tokens. The length of a site is the shorter of its query and key lengths.
        max_seq: largest length, in tokens, of the same; None is no limit.
        head_dim: head dimensions that match; None matches all.
        dtype: dtypes that match, as names or torch.dtype; None matches all.
        steps: range of the steps that match, of the loop around the model: "10:", "3:-3", "0.2:0.8" (fractions), "-1".
            `sparseattn.steps` says which step it is; where no step is set, the rule does not match. None matches all.
        mode: "prefer" takes the first backend of `use` that can serve the site, else leaves it dense and says why.
            "require" takes the first that can, else raises RequirementError when the model is compiled.
            "never" forbids the backends (with `provider`, only that provider of them) to the rules below it, for the
            sites it matches; it does not end the search, so a rule below may choose another backend.
        provider: the provider that must compute it; None takes the first that can. "reference" is only taken if named.
        only_if_faster: skip a backend where it says that it would not pay (shape or machine below its break-even).
        params: parameters of the backends; each backend takes those that it has. keep_ratio and sparsity are each
            1 minus the other, and a backend that has one takes either. A ratio or threshold may be a list with a number
            for each head, or a Schedule (or its table) that follows the steps; `window` of sta follows them as a table.
        layout: VideoLayout of the sites, as one, a table or (T, H, W); None takes what the graph shows, if anything.
        why: a reason for the reader of the file and of the report.

    Raises:
        PolicyError: if a field has a wrong type or value, or no call could satisfy the rule.
    """

    use: tuple[str, ...]
    modules: tuple[str, ...]
    kind: Kind | None
    min_seq: int
    max_seq: int | None
    head_dim: tuple[int, ...]
    dtype: tuple[str, ...]
    steps: str | None
    mode: Mode
    provider: str | None
    only_if_faster: bool
    params: Params
    layout: VideoLayout | None
    why: str

    def __init__(
        self,
        use: str | Sequence[str],
        *,
        modules: str | Sequence[str] = "*",
        kind: Kind | None = None,
        min_seq: int = 0,
        max_seq: int | None = None,
        head_dim: int | Sequence[int] | None = None,
        dtype: str | torch.dtype | Sequence[str | torch.dtype] | None = None,
        steps: str | None = None,
        mode: Mode = "prefer",
        provider: str | None = None,
        only_if_faster: bool = False,
        params: Mapping[str, ParamValue | Sequence[float] | Mapping[str, object]] | Params = (),
        layout: VideoLayout | Mapping[str, object] | Sequence[int] | None = None,
        why: str = "",
    ) -> None:
        names = as_names("use", use)
        normal = {
            "use": names,
            "modules": as_names("modules", modules),
            "kind": None if kind is None else as_choice("kind", kind, ("self", "cross")),
            "min_seq": as_integer("min_seq", min_seq, 0),
            "max_seq": None if max_seq is None else as_integer("max_seq", max_seq, 1),
            "head_dim": as_sizes("head_dim", head_dim),
            "dtype": as_dtypes("dtype", dtype),
            "steps": None if steps is None else str(StepRange.parse(steps)),
            "mode": as_choice("mode", mode, ("prefer", "require", "never")),
            "provider": None if provider is None else as_text("provider", provider),
            "only_if_faster": as_flag("only_if_faster", only_if_faster),
            "params": as_params(params, specs_of(names)),
            "layout": None if layout is None else VideoLayout.parse(layout),
            "why": as_text("why", why),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        check_rule(self)

    def mismatch(self, call: AttentionCall, module: str, step: Step | None = None) -> str | None:
        """Why the rule does not speak about this site at this step, or None if it does."""
        seq = min(call.seq_q, call.seq_k)
        dtype = dtype_name(call.dtype)
        checks = (
            (
                not any(fnmatchcase(module, glob) for glob in self.modules),
                f"module {module!r} is not {' or '.join(self.modules)}",
            ),
            (self.kind not in (None, call.kind), f"it is {call.kind}-attention, not {self.kind}"),
            (seq < self.min_seq, f"length {seq} < min_seq {self.min_seq}"),
            (self.max_seq is not None and seq > self.max_seq, f"length {seq} > max_seq {self.max_seq}"),
            (
                bool(self.head_dim) and call.head_dim not in self.head_dim,
                f"head_dim {call.head_dim}, not {' or '.join(map(str, self.head_dim))}",
            ),
            (bool(self.dtype) and dtype not in self.dtype, f"dtype {dtype}, not {' or '.join(self.dtype)}"),
            (not self.covers(step), f"{step or 'no step is set (sparseattn.steps), it'} is not in steps {self.steps}"),
        )
        return next((sentence for differs, sentence in checks if differs), None)

    def covers(self, step: Step | None) -> bool:
        """Whether `steps` has the step; without a step, whether there is no condition.

        Raises:
            PolicyError: if it counts from the end, or in fractions, and the number of steps is not set.
        """
        return self.steps is None or (step is not None and step in StepRange.parse(self.steps))

    @property
    def depends_on_length(self) -> bool:
        """Whether another length of the same site could change what the rule says."""
        return self.min_seq > 0 or self.max_seq is not None or self.only_if_faster

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their default, as values that TOML and JSON know; `Rule(**d)` gives the rule."""
        blank = Rule(DENSE)
        return {
            field.name: _plain(field.name, getattr(self, field.name))
            for field in fields(self)
            if field.name == "use" or getattr(self, field.name) != getattr(blank, field.name)
        }

    def __str__(self) -> str:
        conditions = {name: value for name, value in self.to_dict().items() if name not in ("use", "mode", "why")}
        listed = ", ".join(f"{name}={value!r}" for name, value in conditions.items())
        text = f"{self.mode} {', '.join(self.use)}{f' where {listed}' if listed else ''}"
        return f"{text} ({self.why})" if self.why else text


def _plain(name: str, value: object) -> object:
    if name == "params":
        return {key: _plain(key, item) for key, item in cast(Params, value)}
    if isinstance(value, Schedule):
        return value.to_dict()
    if isinstance(value, VideoLayout):
        return value.to_dict()
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 and name in _LISTS else list(value)
    return value
