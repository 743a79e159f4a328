import pytest

from sparseattn.attn_ops import registry
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.lowering import presets
from sparseattn.lowering.decide import decide
from sparseattn.lowering.policy import Policy

CPU, GPU = Capability.of("cpu-avx2"), Capability.of("sm90")


def a_call(seq_q, seq_k=None, *, on=GPU, **more):
    seq_k = seq_q if seq_k is None else seq_k
    kind = "self" if seq_q == seq_k else "cross"
    return AttentionCall(1, 8, 8, seq_q, seq_k, 64, device=on.device, kind=kind, **more)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_exists_with_the_installed_backends(name):
    """The real backends: a preset must never name one, or a parameter of one, that the package does not have."""
    policy = Policy.preset(name)
    assert policy.name == name
    assert Policy.load(name) is policy
    assert Policy.load(policy.to_dict()) == policy


def test_unknown_preset():
    with pytest.raises(PolicyError, match=r"unknown preset 'balance'\. Did you mean .balanced.\?"):
        Policy.preset("balance")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("exact", {"exact"}),
        ("auto", {"exact", "quantized"}),
        ("balanced", {"exact", "quantized", "sparse"}),
        ("fast", {"exact", "quantized", "sparse"}),
    ],
)
def test_only_balanced_and_fast_are_sparse(name, kinds):
    known = registry.backends()
    assert {known[backend].kind for rule in Policy.preset(name).rules for backend in rule.use} == kinds


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("name", "call", "on", "backend"),
    [
        ("exact", a_call(8192), GPU, "flash"),
        ("exact", a_call(8192, 77), GPU, "flash"),
        ("auto", a_call(8192), GPU, "sage"),
        ("auto", a_call(8192, 4096), GPU, "sage"),
        ("auto", a_call(8192, 77), GPU, "flash"),
        ("auto", a_call(64), GPU, "flash"),
        ("auto", a_call(8192, on=CPU), CPU, "flash"),
        ("auto", a_call(8192, on=CPU, needs_grad=True), CPU, "flash"),
        ("balanced", a_call(8192), GPU, "block_topk"),
        ("balanced", a_call(8192, on=CPU), CPU, "block_topk"),
        ("balanced", a_call(8192, 4096), GPU, "sage"),
        ("balanced", a_call(8192, 77), GPU, "flash"),
        ("balanced", a_call(2048), GPU, "sage"),
        ("balanced", a_call(2048, on=CPU), CPU, "flash"),
        ("balanced", a_call(64), GPU, "flash"),
        ("fast", a_call(8192), GPU, "block_topk"),
    ],
)
def test_what_a_preset_chooses(name, call, on, backend):
    assert decide(call, on, Policy.preset(name)).backend == backend


@pytest.mark.usefixtures("stand_ins")
def test_auto_trains_with_exact_attention_and_says_why():
    call = a_call(8192, needs_grad=True)
    decision = decide(call, Capability.of("sm90"), Policy.preset("auto"))
    assert (decision.backend, decision.provider) == ("flash", "fused")
    assert "a gradient is needed and it has none" in dict(decision.rejected)["sage"]
    assert "sage cannot: a gradient is needed and it has none" in decision.why


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_keep_ratio_reaches_the_decision(name):
    decision = decide(a_call(8192), GPU, Policy.preset(name))
    assert dict(decision.params) == {"keep_ratio": presets.KEEP_RATIO[name]}


def test_fast_keeps_less_than_balanced():
    assert 0 < presets.KEEP_RATIO["fast"] < presets.KEEP_RATIO["balanced"] < 1


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_leaves_dense_what_nothing_can_serve(name):
    decision = decide(a_call(8192, mask="float"), GPU, Policy.preset(name))
    assert decision.is_dense
    assert "a float mask is given and it takes none" in dict(decision.rejected)["flash"]
