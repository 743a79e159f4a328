"""decide: which backend and provider serve one site, and why every other candidate does not.

A pure function of the call, the machine, the policy and the module's path: no tensor, no graph, no environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..attn_ops.call import AttentionCall
from ..attn_ops.capability import Capability
from ..attn_ops.errors import RequirementError
from ..attn_ops.registry import backends
from ..attn_ops.spec import BackendSpec, Provider
from ..attn_ops.step_range import Step
from .decision import Decision, Rejection
from .policy import Policy
from .rule import Rule
from .rule_checks import DENSE, specs_of

REFERENCE = "reference"
DEFINITION = "a definition, never chosen unless pinned"


@dataclass(frozen=True)
class _Trial:
    """One backend tried: the provider that would compute it, else the backend's reasons and those of its providers."""

    name: str
    provider: Provider | None
    reasons: tuple[str, ...] = ()
    by_provider: tuple[Rejection, ...] = ()
    unasked: frozenset[str] = frozenset()

    @property
    def rejections(self) -> list[Rejection]:
        return [*([(self.name, self.reasons)] if self.reasons else []), *self.by_provider]

    @property
    def refusal(self) -> str:
        """What matters of it in one line: the backend's own reasons, else those of each provider."""
        by_provider = [
            f"{label.partition('/')[2]}: {', '.join(reasons)}"
            for label, reasons in self.by_provider
            if not self.unasked.issuperset(reasons)
        ]
        return "; ".join(self.reasons or by_provider) or f'it is {DEFINITION} (provider = "{REFERENCE}")'


@dataclass
class _Search:
    """The walk through the rules for one site: what has been forbidden and passed over so far."""

    call: AttentionCall
    capability: Capability
    module: str
    step: Step | None
    forbidden: dict[tuple[str, str | None], str] = field(default_factory=dict)
    passed: dict[str, str] = field(default_factory=dict)
    by_length: bool = False

    def matches(self, number: int, rule: Rule) -> bool:
        """Whether the rule decides the site; else remember what it means for the rules below."""
        self.by_length |= rule.depends_on_length
        mismatch = rule.mismatch(self.call, self.module, self.step)
        if mismatch is None and rule.mode != "never":
            return True
        for name in rule.use:
            if mismatch is None:
                self.forbidden.setdefault((name, rule.provider), f"rule {number} forbids it")
            elif rule.mode != "never":
                self.passed.setdefault(name, f"rule {number} does not match: {mismatch}")
        return False

    def attempt(self, spec: BackendSpec, rule: Rule | None = None) -> _Trial:
        """Try a backend, as a rule asks for it, and its providers in their order."""
        call = replace(self.call, params=spec.complete(rule.params if rule else ()))
        if rule and rule.layout:
            call = replace(call, layout=rule.layout)
        pinned = rule.provider if rule else None
        only_if_faster = rule is not None and rule.only_if_faster
        common = [*self._forbids(spec.name, None), *spec.reasons(call, self.capability)]
        providers = [p for p in spec.providers if pinned in (None, p.name)]
        if not providers:
            common.append(f"it has no provider {pinned!r}")
        rejected: list[Rejection] = []
        unasked = {DEFINITION, *(provider.only_if_named for provider in providers)} if pinned is None else set()
        for provider in providers:
            reasons = [r for r in self._provider_reasons(spec, provider, call, pinned) if r not in common]
            if not reasons and not common:
                loss = spec.break_even(call, self.capability) if only_if_faster and spec.break_even else None
                if loss is None:
                    return _Trial(spec.name, provider)
                return _Trial(spec.name, None, (loss,), tuple(rejected))
            if reasons and not (common and unasked.issuperset(reasons)):
                rejected.append((f"{spec.name}/{provider.name}", tuple(reasons)))
        return _Trial(spec.name, None, tuple(common), tuple(rejected), frozenset(unasked))

    def _provider_reasons(
        self, spec: BackendSpec, provider: Provider, call: AttentionCall, pinned: str | None
    ) -> list[str]:
        if provider.name == REFERENCE and pinned is None:
            return [DEFINITION]
        if provider.only_if_named and pinned is None:
            return [provider.only_if_named]
        return [*self._forbids(spec.name, provider.name), *provider.reasons(call, self.capability)]

    def _forbids(self, name: str, provider: str | None) -> list[str]:
        reason = self.forbidden.get((name, provider))
        return [] if reason is None else [reason]

    def others(self, tried: tuple[str, ...], unasked: str) -> list[Rejection]:
        """The reasons of every selectable backend outside `tried`; one without any was not asked for."""
        rejections = []
        for name, spec in sorted(backends().items()):
            if name in tried or not spec.selectable:
                continue
            trial = self.attempt(spec)
            asked = [self.passed[name]] if name in self.passed else [] if trial.rejections else [unasked]
            own = (*asked, *trial.reasons)
            rejections += [*([(name, own)] if own else []), *trial.by_provider]
        return rejections

    @property
    def note(self) -> str:
        """A tail for the sentence where the decision rests on the hint of a symbolic length."""
        lengths = [name for name in ("seq_q", "seq_k") if name in self.call.dynamic]
        return f"; decided at the present value of {' and '.join(lengths)}" if lengths and self.by_length else ""


def decide(
    call: AttentionCall, capability: Capability, policy: Policy, *, module: str = "", step: Step | None = None
) -> Decision:
    """Choose for one site.

    Args:
        call: what is asked.
        capability: what the machine offers.
        policy: what the user wants.
        module: path of the module that asks, such as "blocks.0.attn1"; "" if unknown.
        step: where the loop around the model is, or None if that is not set.

    Returns:
        The choice, with the reasons of every other selectable backend.

    Raises:
        RequirementError: if the deciding rule has mode "require" and nothing it names can serve the call; the message
            lists every reason.
    """
    search = _Search(call, capability, module, step)
    for number, rule in enumerate(policy.rules, 1):
        if search.matches(number, rule):
            return _by_rule(search, number, rule)
    why = f"no rule of policy {policy.name} matches{search.note}"
    return Decision(why=why, rejected=tuple(search.others((), "no rule asks for it")))


def _by_rule(search: _Search, number: int, rule: Rule) -> Decision:
    failed: list[_Trial] = []
    for spec in specs_of(rule.use):
        trial = search.attempt(spec, rule)
        if trial.provider is not None:
            return _decision(search, number, rule, failed, spec, trial.provider)
        failed.append(trial)
    if rule.mode == "require" and DENSE not in rule.use:
        raise RequirementError(_requirement(search, number, rule, failed))
    return _decision(search, number, rule, failed)


def _decision(
    search: _Search,
    number: int,
    rule: Rule,
    failed: list[_Trial],
    spec: BackendSpec | None = None,
    provider: Provider | None = None,
) -> Decision:
    chosen = DENSE if spec is None else spec.name
    later = [name for name in rule.use[len(failed) + 1 :] if name != DENSE]
    rejected = [
        *(rejection for trial in failed for rejection in trial.rejections),
        *((name, (f"rule {number} names {chosen} before it",)) for name in later),
        *search.others(rule.use, f"rule {number} does not ask for it"),
    ]
    return Decision(
        backend=spec.name if spec else None,
        provider=provider.name if provider else None,
        params=spec.own(rule.params) if spec else (),
        layout=rule.layout or search.call.layout if spec and spec.support.layout else None,
        rule=number,
        rule_text=str(rule),
        why=_sentence(number, rule, failed, chosen) + search.note,
        rejected=tuple(rejected),
    )


def _sentence(number: int, rule: Rule, failed: list[_Trial], chosen: str) -> str:
    wish = rule.why or f"rule {number} {rule.mode}s {', then '.join(rule.use)}"
    refusals = [f"{trial.name} cannot: {trial.refusal}" for trial in failed]
    fallback = ["left dense"] if chosen not in rule.use else []
    return ". ".join([wish, *refusals, *fallback])


def _requirement(search: _Search, number: int, rule: Rule, failed: list[_Trial]) -> str:
    lines = [
        f"rule {number} requires {' or '.join(rule.use)} at {search.module or 'an unnamed module'}, but:",
        f"  call: {search.call}",
        f"  machine: {search.capability}",
    ]
    for label, reasons in (rejection for trial in failed for rejection in trial.rejections):
        lines += [f"  {label}:", *(f"    {reason}" for reason in reasons)]
    lines.append('Write mode = "prefer" to leave such sites dense, or narrow the rule with modules, kind or min_seq.')
    return "\n".join(lines)
