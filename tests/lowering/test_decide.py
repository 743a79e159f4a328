import dataclasses

import pytest
import torch
from support.made_up_backends import BLOCKS, MADE_UP, PLAIN, QUANT, no_kernel

from sparseattn.attn_ops import registry
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import PolicyError, RequirementError
from sparseattn.attn_ops.spec import Provider, Support
from sparseattn.lowering.decide import decide
from sparseattn.lowering.decision import Decision
from sparseattn.lowering.policy import Policy, Rule

pytestmark = pytest.mark.usefixtures("made_up")

CPU = Capability.of("cpu-avx2")
GPU = Capability.of("sm90")
VENDOR = Capability.of("sm90", {"triton": "3.6", "sageattention": "2.2"})
OLD = Capability.of("sm75")


def a_call(seq_q=8192, seq_k=None, *, head_dim=64, device="cpu", kv_heads=8, **more):
    seq_k = seq_q if seq_k is None else seq_k
    kind = "self" if seq_q == seq_k else "cross"
    return AttentionCall(1, 8, kv_heads, seq_q, seq_k, head_dim, device=device, kind=kind, **more)


def by(*rules, call=None, on=CPU, module="m"):
    return decide(call or a_call(device=on.device), on, Policy(rules), module=module)


def reasons(decision: Decision) -> dict[str, tuple[str, ...]]:
    labels = [label for label, _ in decision.rejected]
    assert len(labels) == len(set(labels)), "a candidate is listed twice"
    return dict(decision.rejected)


def test_no_rule():
    decision = by()
    assert decision.is_dense
    assert (decision.provider, decision.rule, decision.rule_text) == (None, None, "")
    assert decision.op == "scaled_dot_product_attention"
    assert decision.why == "no rule of policy custom matches"
    assert reasons(decision) == {
        "plain": ("no rule asks for it",),
        "quant": ("no rule asks for it",),
        "blocks": ("no rule asks for it",),
    }


def test_served():
    decision = by(Rule("plain"))
    assert (decision.backend, decision.provider, decision.rule) == ("plain", "fused", 1)
    assert decision.op == "plain_attention"
    assert not decision.is_dense
    assert decision.rule_text == "prefer plain"
    assert decision.why == "rule 1 prefers plain"


def test_first_matching_rule_decides():
    rules = Rule("quant", modules="other"), Rule("plain"), Rule("quant")
    decision = by(*rules)
    assert (decision.backend, decision.rule) == ("plain", 2)
    assert reasons(decision)["quant"] == ("rule 1 does not match: module 'm' is not other",)


def test_first_matching_rule_decides_even_if_nothing_serves_it():
    decision = by(Rule("blocks"), Rule("plain"), call=a_call(8, 4))
    assert (decision.backend, decision.rule) == (None, 1)


@pytest.mark.parametrize(("seq", "backend"), [(1023, "plain"), (1024, "quant")])
def test_min_seq_is_inclusive(seq, backend):
    assert by(Rule("quant", min_seq=1024), Rule("plain"), call=a_call(seq)).backend == backend


def test_not_asked_for():
    rejected = reasons(by(Rule("plain")))
    assert rejected["quant"] == ("rule 1 does not ask for it",)
    assert rejected["blocks"] == ("rule 1 does not ask for it",)


def test_candidates_outside_the_rule_keep_their_own_reasons():
    rejected = reasons(by(Rule("plain"), call=a_call(8, 4, needs_grad=True)))
    assert rejected["blocks"] == ("cross-attention: 8 queries, 4 keys",)
    assert rejected["quant"] == ("a gradient is needed and it has none",)


def test_a_passed_rule_is_named_before_the_candidates_own_reasons():
    rejected = reasons(by(Rule("blocks", min_seq=64), Rule("plain"), call=a_call(8, 4)))
    assert rejected["blocks"] == (
        "rule 1 does not match: length 4 < min_seq 64",
        "cross-attention: 8 queries, 4 keys",
    )


def test_unselectable_backends_are_no_candidates():
    assert not any(label.startswith("hidden") for label in reasons(by(Rule("plain"))))


@pytest.mark.parametrize("mode", ["prefer", "require"])
def test_dense_is_a_choice(mode):
    decision = by(Rule("dense", mode=mode))
    assert decision.is_dense
    assert decision.rule == 1
    assert decision.why == f"rule 1 {mode}s dense"


def test_prefer_takes_the_first_that_can():
    decision = by(Rule(("blocks", "quant", "plain")), call=a_call(8, 4))
    assert (decision.backend, decision.provider) == ("quant", "cpu")
    assert decision.why == (
        "rule 1 prefers blocks, then quant, then plain. blocks cannot: cross-attention: 8 queries, 4 keys"
    )
    assert reasons(decision)["plain"] == ("rule 1 names quant before it",)


def test_prefer_falls_back_to_dense_with_reasons():
    decision = by(Rule("quant,blocks"), call=a_call(8, 4, needs_grad=True))
    assert decision.is_dense
    assert decision.rule == 1
    assert decision.params == ()
    assert decision.why.startswith("rule 1 prefers quant, then blocks. quant cannot: a gradient is needed")
    assert decision.why.endswith(". left dense")
    assert {"quant", "blocks"} <= set(reasons(decision))


def test_prefer_with_dense_last_says_the_same_without_fallback():
    decision = by(Rule("blocks,dense"), call=a_call(8, 4))
    assert decision.is_dense
    assert "left dense" not in decision.why
    assert "blocks cannot" in decision.why


def test_order_of_rejections_is_that_of_the_rule_then_of_names():
    decision = by(Rule("quant"), call=a_call(needs_grad=True))
    assert decision.rejected[0][0] == "quant"
    assert [label for label, _ in decision.rejected if "/" not in label] == ["quant", "blocks", "plain"]


@pytest.mark.parametrize(("capability", "provider"), [(VENDOR, "vendor"), (GPU, "triton"), (CPU, "cpu")])
def test_first_provider_that_can(capability, provider):
    assert by(Rule("quant"), on=capability).provider == provider


def test_providers_before_the_chosen_one_are_rejected_only_in_a_failure():
    assert not any("/" in label for label in reasons(by(Rule("quant"), on=GPU)))


def test_every_provider_says_why_not():
    rejected = reasons(by(Rule("quant"), on=OLD))
    assert rejected == {
        "quant/vendor": (
            "needs sm80 or newer, this is sm75",
            "sageattention is not installed (pip install sageattention)",
        ),
        "quant/triton": ("needs sm80 or newer, this is sm75",),
        "quant/cpu": ("needs a cpu device, this is cuda",),
        "quant/reference": ("a definition, never chosen unless pinned",),
        "blocks/cpu": ("needs a cpu device, this is cuda",),
        "blocks/triton": ("needs sm80 or newer, this is sm75",),
        "blocks/reference": ("a definition, never chosen unless pinned",),
        "plain": ("rule 1 does not ask for it",),
    }


def test_common_reasons_are_said_once():
    rejected = reasons(by(Rule("quant"), call=a_call(mask="bool", dropout=0.1, needs_grad=True)))
    assert rejected["quant"] == (
        "a bool mask is given and it takes none",
        "dropout 0.1 and it has none",
        "a gradient is needed and it has none",
    )
    assert rejected["quant/vendor"] == (
        "needs a cuda device, this is cpu",
        "sageattention is not installed (pip install sageattention)",
    )
    assert "quant/cpu" not in rejected
    assert "quant/reference" not in rejected


def test_further_requirements_of_a_backend_count():
    rejected = reasons(by(Rule("blocks"), call=a_call(kv_heads=2)))
    assert rejected["blocks"] == ("grouped heads",)


def test_a_stricter_range_of_a_provider_is_its_own_reason():
    decision = by(Rule("plain"), call=a_call(head_dim=160))
    assert decision.is_dense
    assert reasons(decision)["plain/fused"] == ("head_dim 160, not 1 to 128",)


def test_the_reference_is_never_chosen_by_itself():
    decision = by(Rule("plain"), call=a_call(head_dim=160))
    assert reasons(decision)["plain/reference"] == ("a definition, never chosen unless pinned",)
    assert "reference" not in decision.why


def test_pinned_reference():
    decision = by(Rule("plain", provider="reference"), call=a_call(head_dim=160))
    assert (decision.backend, decision.provider) == ("plain", "reference")


def test_a_pinned_provider_is_the_only_one_considered():
    decision = by(Rule("quant", provider="vendor"), on=GPU)
    assert decision.is_dense
    own = {label: why for label, why in reasons(decision).items() if label.startswith("quant")}
    assert own == {"quant/vendor": ("sageattention is not installed (pip install sageattention)",)}


def test_a_pin_skips_backends_without_that_provider():
    decision = by(Rule("plain,quant", provider="triton"), on=GPU)
    assert (decision.backend, decision.provider) == ("quant", "triton")
    assert "plain cannot: it has no provider 'triton'" in decision.why


def test_a_barrier_stops_everything():
    decision = by(Rule("quant,blocks,plain"), call=a_call(barrier="inside torch.func.vmap"))
    assert decision.is_dense
    rejected = reasons(decision)
    assert all(rejected[name] == ("inside torch.func.vmap",) for name in ("quant", "blocks", "plain"))


def test_training_takes_the_backend_that_has_gradients():
    rule = Rule("quant,plain", min_seq=1024)
    assert by(rule).backend == "quant"
    decision = by(rule, call=a_call(needs_grad=True))
    assert (decision.backend, decision.provider) == ("plain", "fused")
    assert reasons(decision)["quant"] == ("a gradient is needed and it has none",)


def test_training_needs_a_provider_with_a_backward_kernel():
    decision = by(Rule("blocks"), call=a_call(device="cuda", needs_grad=True), on=GPU)
    assert decision.is_dense
    assert reasons(decision)["blocks/triton"] == ("a gradient is needed and it has no backward kernel",)


def test_break_even_is_asked_only_if_told():
    assert by(Rule("quant")).backend == "quant"
    decision = by(Rule("quant,plain", only_if_faster=True))
    assert decision.backend == "plain"
    assert reasons(decision)["quant"] == ("slower than dense on a CPU",)
    assert by(Rule("quant,plain", only_if_faster=True), on=GPU).backend == "quant"


@pytest.mark.parametrize(("seq", "backend"), [(4095, "plain"), (4096, "blocks")])
def test_break_even_by_length(seq, backend):
    assert by(Rule("blocks,plain", only_if_faster=True), call=a_call(seq)).backend == backend


def test_break_even_is_not_mentioned_where_it_cannot_run():
    rejected = reasons(by(Rule("quant", only_if_faster=True), call=a_call(needs_grad=True)))
    assert rejected["quant"] == ("a gradient is needed and it has none",)


def test_break_even_keeps_the_reasons_of_providers():
    decision = by(Rule("blocks", only_if_faster=True), call=a_call(1024, device="cuda"), on=GPU)
    own = {label: why for label, why in reasons(decision).items() if label.startswith("blocks")}
    assert own == {
        "blocks": ("1024 tokens, break-even is 4096",),
        "blocks/cpu": ("needs a cpu device, this is cuda",),
    }


def test_a_backend_without_break_even_always_pays():
    assert by(Rule("plain", only_if_faster=True)).backend == "plain"


def test_each_backend_takes_the_parameters_that_it_has():
    rule = Rule("blocks,quant,plain", params={"keep_ratio": 0.25, "bits": 8, "smooth": False})
    assert by(rule).params == (("bits", 8), ("keep_ratio", 0.25))
    assert by(rule, call=a_call(8, 4)).params == (("bits", 8), ("smooth", False))
    assert by(rule, call=a_call(8, 4, needs_grad=True)).params == ()


def test_never_forbids_but_does_not_decide():
    decision = by(Rule("quant", mode="never", modules="m"), Rule("quant,plain"))
    assert (decision.backend, decision.rule) == ("plain", 2)
    assert reasons(decision)["quant"] == ("rule 1 forbids it",)


def test_never_holds_only_where_it_matches():
    rules = Rule("quant", mode="never", modules="vae.*"), Rule("quant")
    assert by(*rules).backend == "quant"
    assert by(*rules, module="vae.attn").is_dense


def test_never_says_nothing_to_the_rules_above():
    assert by(Rule("quant"), Rule("quant", mode="never")).backend == "quant"


def test_never_is_a_reason_of_backends_that_no_rule_asks_for():
    assert reasons(by(Rule("quant", mode="never"), Rule("plain")))["quant"] == ("rule 1 forbids it",)
    assert reasons(by(Rule("quant", mode="never")))["quant"] == ("rule 1 forbids it",)


def test_a_never_that_does_not_match_is_not_mentioned():
    rejected = reasons(by(Rule("quant", mode="never", modules="vae.*"), Rule("plain")))
    assert rejected["quant"] == ("rule 2 does not ask for it",)


def test_the_first_never_is_named():
    never = Rule("quant", mode="never")
    assert reasons(by(never, never, Rule("plain")))["quant"] == ("rule 1 forbids it",)


def test_never_a_provider():
    rules = Rule("quant", mode="never", provider="vendor"), Rule("quant")
    decision = by(*rules, on=VENDOR)
    assert (decision.backend, decision.provider) == ("quant", "triton")
    pinned = by(rules[0], Rule("quant", provider="vendor"), on=VENDOR)
    assert pinned.is_dense
    assert reasons(pinned)["quant/vendor"] == ("rule 1 forbids it",)


@pytest.fixture
def tried(made_up, monkeypatch):
    """A backend whose first provider is chosen by name only."""
    trial = Provider("trial", "trial", load=no_kernel, only_if_named="not measured yet")
    spec = dataclasses.replace(PLAIN, name="tried", op="tried", providers=(trial, *PLAIN.providers))
    monkeypatch.setitem(registry._backends, "tried", spec)


@pytest.mark.usefixtures("tried")
def test_what_only_its_name_chooses_is_never_chosen_by_itself():
    assert by(Rule("tried")).provider == "fused"
    decision = by(Rule("tried"), call=a_call(head_dim=160))
    assert reasons(decision)["tried/trial"] == ("not measured yet",)
    assert "not measured yet" not in decision.why
    assert "tried/trial" not in reasons(by(Rule("tried"), call=a_call(mask="bool")))


@pytest.mark.usefixtures("tried")
def test_what_only_its_name_chooses_is_served_by_name():
    assert by(Rule("tried", provider="trial")).provider == "trial"
    refused = by(Rule("tried", provider="trial"), call=a_call(needs_grad=True))
    assert reasons(refused)["tried/trial"] == ("a gradient is needed and it has no backward kernel",)


def test_never_the_pinned_reference():
    rules = Rule("plain", mode="never", provider="reference"), Rule("plain", provider="reference")
    assert reasons(by(*rules))["plain/reference"] == ("rule 1 forbids it",)


def test_require_is_obeyed():
    decision = by(Rule("blocks", mode="require"))
    assert (decision.backend, decision.why) == ("blocks", "rule 1 requires blocks")


def test_require_raises_with_every_reason():
    with pytest.raises(RequirementError) as raised:
        by(Rule("blocks,quant", mode="require"), call=a_call(64, 32, needs_grad=True), module="blocks.3.attn2")
    assert str(raised.value) == "\n".join(
        [
            "rule 1 requires blocks or quant at blocks.3.attn2, but:",
            "  call: cross (1,8,64x32,64), float32, cpu, needs grad",
            "  machine: cpu-avx2",
            "  blocks:",
            "    cross-attention: 64 queries, 32 keys",
            "  blocks/triton:",
            "    needs a cuda device, this is cpu",
            "    triton is not installed",
            "    a gradient is needed and it has no backward kernel",
            "  quant:",
            "    a gradient is needed and it has none",
            "  quant/vendor:",
            "    needs a cuda device, this is cpu",
            "    sageattention is not installed (pip install sageattention)",
            "  quant/triton:",
            "    needs a cuda device, this is cpu",
            "    triton is not installed",
            "    a gradient is needed and it has no backward kernel",
            'Write mode = "prefer" to leave such sites dense, or narrow the rule with modules, kind or min_seq.',
        ]
    )


def test_require_raises_when_forbidden_above():
    with pytest.raises(RequirementError, match=r"rule 2 requires quant(.|\n)*rule 1 forbids it"):
        by(Rule("quant", mode="never"), Rule("quant", mode="require"))


def test_require_is_silent_where_it_does_not_match():
    assert by(Rule("blocks", mode="require", kind="self"), Rule("plain"), call=a_call(8, 4)).backend == "plain"


def test_require_without_module_name():
    with pytest.raises(RequirementError, match="at an unnamed module"):
        by(Rule("blocks", mode="require"), call=a_call(8, 4), module="")


@pytest.mark.parametrize(
    ("condition", "dynamic", "tail"),
    [
        ({"min_seq": 8}, ("seq_q", "seq_k"), "; decided at the present value of seq_q and seq_k"),
        ({"only_if_faster": True}, ("seq_k",), "; decided at the present value of seq_k"),
        ({"max_seq": 8192}, ("seq_q",), "; decided at the present value of seq_q"),
        ({"min_seq": 8}, ("batch",), ""),
        ({}, ("seq_q", "seq_k"), ""),
    ],
)
def test_a_decision_on_a_symbolic_length_says_so(condition, dynamic, tail):
    why = by(Rule("plain", **condition), call=a_call(dynamic=dynamic)).why
    assert why.endswith(tail)
    assert ("present value" in why) is bool(tail)


def test_rules_above_the_deciding_one_count():
    call = a_call(8, dynamic=("seq_q",))
    assert "present value of seq_q" in by(Rule("quant", min_seq=9), Rule("plain"), call=call).why
    assert "present value of seq_q" in by(Rule("quant", min_seq=9), call=call).why


def test_rules_below_the_deciding_one_do_not_count():
    decision = by(Rule("plain"), Rule("quant", min_seq=8), call=a_call(dynamic=("seq_q",)))
    assert "present value" not in decision.why


def test_decision_is_a_value():
    first, second = (by(Rule("quant,plain", params={"bits": 4})) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


CALLS = [
    a_call(seq_q, seq_k, head_dim=head_dim, needs_grad=grad, mask=mask, dtype=dtype, kv_heads=kv)
    for seq_q, seq_k in ((8, 8), (8192, 8192), (8192, 77))
    for head_dim in (8, 64, 256)
    for grad in (False, True)
    for mask in ("none", "float")
    for dtype in (torch.float32, torch.bfloat16)
    for kv in (2, 8)
]
POLICIES = [
    [{"use": "blocks,quant,plain", "only_if_faster": True}],
    [{"use": "quant", "mode": "never"}, {"use": "quant,blocks", "min_seq": 100}, {"use": "plain"}],
    [{"use": "plain", "kind": "cross"}, {"use": "blocks", "provider": "triton"}],
]


@pytest.mark.parametrize("capability", [CPU, GPU, VENDOR, OLD], ids=str)
@pytest.mark.parametrize("rules", POLICIES, ids=range(len(POLICIES)))
def test_every_decision_is_sound_and_complete(rules, capability):
    """What is chosen has no reason against it; what is not chosen has one; nothing is both."""
    policy = Policy.load({"rules": rules})
    for call in CALLS:
        call = dataclasses.replace(call, device=capability.device)
        decision = decide(call, capability, policy)
        rejected = reasons(decision)
        assert all(why and all(why) for why in rejected.values())
        for name in ("plain", "quant", "blocks"):
            mentioned = any(label.partition("/")[0] == name for label in rejected)
            assert mentioned is (name != decision.backend), f"{call}: {decision}"
        if decision.backend is not None:
            spec = MADE_UP[decision.backend]
            assert not spec.reasons(call, capability)
            assert not spec.provider(decision.provider).reasons(call, capability)
            assert f"rule {decision.rule} " in decision.why
            assert decision.backend in policy.rules[decision.rule - 1].use


def test_a_policy_whose_backend_is_gone_is_an_error(monkeypatch):
    policy = Policy([Rule("quant")])
    monkeypatch.delitem(registry._backends, "quant")
    with pytest.raises(PolicyError, match="unknown backend 'quant'"):
        decide(a_call(), CPU, policy)


def test_a_third_partys_backend_needs_nothing_else(monkeypatch):
    provider = Provider("theirs", "theirs", load=no_kernel, support=Support(head_dim=(64, 64)))
    theirs = dataclasses.replace(QUANT, name="theirs", op="theirs", providers=(provider,), break_even=None)
    monkeypatch.setitem(registry._backends, "theirs", theirs)
    assert by(Rule("theirs", params={"bits": 4})).provider == "theirs"
    assert by(Rule("theirs"), call=a_call(head_dim=80)).is_dense


def test_made_up_backends_cover_the_kinds():
    assert {spec.kind for spec in (PLAIN, QUANT, BLOCKS)} == {"exact", "quantized", "sparse"}
