import dataclasses
import pickle

import pytest
import torch

from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.lowering.policy import Policy, Rule

pytestmark = pytest.mark.usefixtures("made_up")


def a_call(seq_q=1024, seq_k=None, *, head_dim=64, dtype=torch.float32, **more):
    seq_k = seq_q if seq_k is None else seq_k
    kind = "self" if seq_q == seq_k else "cross"
    return AttentionCall(1, 8, 8, seq_q, seq_k, head_dim, dtype=dtype, kind=kind, **more)


@pytest.mark.parametrize(
    ("given", "field", "normal"),
    [
        ({"use": "plain"}, "use", ("plain",)),
        ({"use": "quant, plain"}, "use", ("quant", "plain")),
        ({"use": ["quant", "dense"]}, "use", ("quant", "dense")),
        ({"modules": "a.*, b.*"}, "modules", ("a.*", "b.*")),
        ({"modules": ("a.*", "b.*")}, "modules", ("a.*", "b.*")),
        ({"head_dim": 64}, "head_dim", (64,)),
        ({"head_dim": [128, 64, 64]}, "head_dim", (64, 128)),
        ({"dtype": torch.bfloat16}, "dtype", ("bfloat16",)),
        ({"dtype": "float16,bfloat16"}, "dtype", ("bfloat16", "float16")),
        ({"dtype": ["float32", torch.float16]}, "dtype", ("float16", "float32")),
        ({"use": "blocks", "params": {"keep_ratio": 1}}, "params", (("keep_ratio", 1.0),)),
        ({"use": "quant", "params": {"smooth": False, "bits": 4}}, "params", (("bits", 4), ("smooth", False))),
    ],
)
def test_fields_have_one_normal_form(given, field, normal):
    rule = Rule(**{"use": "plain", **given})
    assert getattr(rule, field) == normal
    assert [type(item) for item in getattr(rule, field)] == [type(item) for item in normal]


def test_defaults_match_everything():
    rule = Rule("plain")
    for call in (a_call(1), a_call(1 << 20), a_call(8, 4), a_call(dtype=torch.float16), a_call(head_dim=250)):
        assert rule.mismatch(call, "") is None
        assert rule.mismatch(call, "any.module") is None


def test_rule_is_a_value():
    first, second = (
        Rule("quant", params={"bits": 4, "smooth": True}),
        Rule(["quant"], params={"smooth": True, "bits": 4}),
    )
    assert first == second
    assert hash(first) == hash(second)
    assert first != Rule("quant")
    assert pickle.loads(pickle.dumps(first)) == first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.min_seq = 3


def test_replace_checks_again():
    rule = Rule("plain", max_seq=100, head_dim=64, dtype="float32")
    assert dataclasses.replace(rule, min_seq=10).min_seq == 10
    with pytest.raises(PolicyError, match="larger than max_seq"):
        dataclasses.replace(rule, min_seq=101)


def test_rule_text_names_what_was_written():
    rule = Rule("blocks", modules="blocks.*", kind="self", min_seq=1024, mode="require", why="tuned")
    assert str(rule) == "require blocks where modules='blocks.*', kind='self', min_seq=1024 (tuned)"
    assert str(Rule(("quant", "plain"))) == "prefer quant, plain"


@pytest.mark.parametrize(
    ("given", "depends"),
    [({}, False), ({"min_seq": 1}, True), ({"max_seq": 9}, True), ({"only_if_faster": True}, True)],
)
def test_depends_on_length(given, depends):
    assert Rule("plain", **given).depends_on_length is depends


@pytest.mark.parametrize(
    ("modules", "module", "matches"),
    [
        ("*", "", True),
        ("blocks.*.attn1", "blocks.0.attn1", True),
        ("blocks.*.attn1", "blocks.0.attn2", False),
        ("blocks.*", "blocks.0.inner.attn", True),
        ("blocks.[01].*", "blocks.2.attn", False),
        ("blocks.?.attn", "blocks.7.attn", True),
        ("Blocks.*", "blocks.0", False),
        ("a.*, b.*", "b.x", True),
        (("a.*", "b.*"), "c.x", False),
        ("blocks.0", "blocks.0.attn", False),
        ("blocks.*", "", False),
    ],
)
def test_modules_are_case_sensitive_globs(modules, module, matches):
    assert (Rule("plain", modules=modules).mismatch(a_call(), module) is None) is matches


@pytest.mark.parametrize(
    ("seq_q", "seq_k", "matches"),
    [(99, 99, False), (100, 100, True), (200, 200, True), (201, 201, False), (5000, 99, False), (99, 5000, False)],
)
def test_length_is_the_shorter_of_the_two(seq_q, seq_k, matches):
    assert (Rule("plain", min_seq=100, max_seq=200).mismatch(a_call(seq_q, seq_k), "") is None) is matches


@pytest.mark.parametrize(("seq_q", "seq_k"), [(1023, 1023), (1024, 1024), (4096, 77), (77, 4096), (4096, 1024)])
def test_adjacent_ranges_leave_no_gap_and_no_overlap(seq_q, seq_k):
    rules = Rule("plain", max_seq=1023), Rule("plain", min_seq=1024)
    assert sum(rule.mismatch(a_call(seq_q, seq_k), "") is None for rule in rules) == 1


@pytest.mark.parametrize(
    ("given", "call", "sentence"),
    [
        ({"modules": "a.*,b.*"}, a_call(), "module 'm' is not a.* or b.*"),
        ({"kind": "self"}, a_call(8, 4), "it is cross-attention, not self"),
        ({"kind": "cross"}, a_call(8), "it is self-attention, not cross"),
        ({"min_seq": 2048}, a_call(4096, 77), "length 77 < min_seq 2048"),
        ({"max_seq": 512}, a_call(1024), "length 1024 > max_seq 512"),
        ({"head_dim": (64, 128)}, a_call(head_dim=80), "head_dim 80, not 64 or 128"),
        ({"dtype": "bfloat16"}, a_call(), "dtype float32, not bfloat16"),
    ],
)
def test_mismatch_is_a_sentence(given, call, sentence):
    assert Rule("plain", **given).mismatch(call, "m") == sentence


WRONG_TYPES = [
    ({"use": 3}, "use must be a str, or a list of str, got 3", 'use = "sage"'),
    ({"use": ""}, "use must name at least one", 'use = "sage"'),
    ({"use": []}, "use must name at least one", 'use = "sage"'),
    ({"use": "plain,plain"}, "each once", 'use = "sage"'),
    ({"modules": "a.*,"}, "modules must name at least one", "blocks.*.attn1"),
    ({"modules": [1]}, "modules must be a str", "blocks.*.attn1"),
    ({"kind": "crossing"}, "kind must be one of these, got 'crossing'", 'Did you mean "cross"?'),
    ({"kind": 1}, "kind must be one of these, got 1", "Known: self, cross"),
    ({"mode": "prefered"}, "mode must be one of these", 'Did you mean "prefer"?'),
    ({"min_seq": "2k"}, "min_seq must be an int of at least 0, got '2k'", "min_seq = 2048"),
    ({"min_seq": -1}, "min_seq must be an int of at least 0, got -1", "min_seq = 2048"),
    ({"min_seq": True}, "min_seq must be an int of at least 0, got True", "min_seq = 2048"),
    ({"min_seq": 2.0}, "min_seq must be an int", "2.0"),
    ({"max_seq": 0}, "max_seq must be an int of at least 1, got 0", "max_seq = 65536"),
    ({"head_dim": "64"}, "head_dim must be a positive int, or a list of them, got '64'", "head_dim = 128"),
    ({"head_dim": 0}, "head_dim must be a positive int", "head_dim = 128"),
    ({"head_dim": [64, True]}, "head_dim must be a positive int", "head_dim = 128"),
    ({"dtype": "bf16"}, "dtype: unknown dtype 'bf16'", "Known: bfloat16, float16, float32"),
    ({"dtype": torch.int8}, "dtype: unknown dtype 'int8'", "Known: bfloat16"),
    ({"dtype": 16}, "dtype must be the name of a dtype", 'dtype = "bfloat16"'),
    ({"provider": 1}, "provider must be a str, got 1", 'provider = "triton"'),
    ({"only_if_faster": 1}, "only_if_faster must be true or false, got 1", "only_if_faster = true"),
    ({"params": "bits"}, "params must be a table", "keep_ratio = 0.4"),
    ({"params": [1]}, "params must be a table", "keep_ratio = 0.4"),
    ({"why": None}, "why must be a str, got None", "why ="),
    ({"steps": "5:3"}, "'5:3' holds no step", "Write for example"),
    ({"steps": 3}, "steps must be a str, got 3", "Write for example"),
]


@pytest.mark.parametrize(("given", "problem", "remedy"), WRONG_TYPES)
def test_wrong_types_say_what_to_write(given, problem, remedy):
    with pytest.raises(PolicyError) as raised:
        Rule(**{"use": "plain", **given})
    assert problem in str(raised.value)
    assert remedy in str(raised.value)


IMPOSSIBLE = [
    ({"use": "qant"}, "use: unknown backend 'qant'", 'Did you mean "quant"?'),
    ({"use": "dens"}, "use: unknown backend 'dens'", 'Did you mean "dense"?'),
    ({"use": "hidden"}, "a policy cannot choose hidden", "torch.ops.sparseattn.hidden_attention"),
    ({"use": "dense,plain"}, "what follows it is never reached", "last"),
    ({"use": "dense", "mode": "never"}, "cannot be forbidden", '"require"'),
    ({"use": "plain,dense", "mode": "require"}, "cannot fail", '"prefer"'),
    ({"min_seq": 10, "max_seq": 9}, "min_seq 10 is larger than max_seq 9", "Swap"),
    ({"use": "quant", "mode": "never", "params": {"bits": 4}}, "forbids whatever the parameters", "Remove params"),
    ({"use": "quant", "mode": "never", "only_if_faster": True}, "forbids whatever the parameters", "only_if_faster"),
    ({"use": "quant", "mode": "require", "only_if_faster": True}, "contradict each other", '"prefer"'),
    ({"use": "quant", "params": {"bit": 4}}, "quant has no parameter 'bit'", 'Did you mean "bits"?'),
    ({"use": "dense", "params": {"bits": 4}}, "dense has no parameter 'bits'", "Known: none"),
    ({"use": "quant", "params": {"bits": 5}}, "bits must be one of (4, 8), got 5", "params of quant"),
    ({"use": "quant,blocks", "params": {"bits": 4}}, "bits must be one of (8,), got 4", "params of blocks"),
    ({"use": "quant", "params": {"bits": "8"}}, "bits must be int, got '8'", "4 or 8"),
    ({"use": "quant", "params": {"smooth": 1}}, "smooth must be bool, got 1", "params of quant"),
    ({"use": "blocks", "params": {"keep_ratio": 1.5}}, "keep_ratio must be in [0.0, 1.0], got 1.5", "Fraction"),
    ({"use": "blocks", "params": {"keep_ratio": float("nan")}}, "keep_ratio must be finite", "number"),
    ({"use": "quant", "provider": "tritton"}, "unknown provider 'tritton'", 'Did you mean "triton"?'),
    ({"use": "dense", "provider": "triton"}, "unknown provider 'triton'", "Known: none"),
    (
        {"use": "blocks", "kind": "cross"},
        "no call can satisfy this rule: blocks takes no cross-attention",
        "Change use",
    ),
    ({"use": "blocks", "head_dim": 160}, "blocks takes head_dim 16 to 128, not 160", "remove the condition"),
    ({"use": "plain", "head_dim": 320, "mode": "require"}, "plain takes head_dim 1 to 256, not 320", "Change use"),
    ({"use": "plain", "provider": "fused", "head_dim": 160}, "plain/fused takes head_dim 1 to 128", "Change use"),
    ({"use": "blocks,plain", "provider": "fused", "head_dim": 160}, "blocks has no provider 'fused'", "plain/fused"),
]


@pytest.mark.parametrize(("given", "problem", "remedy"), IMPOSSIBLE)
def test_impossible_rules_are_refused_when_made(given, problem, remedy):
    with pytest.raises(PolicyError) as raised:
        Rule(**{"use": "plain", **given})
    assert problem in str(raised.value)
    assert remedy in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {"use": "blocks,plain", "kind": "cross"},
        {"use": "blocks,dense", "kind": "cross"},
        {"use": "blocks", "head_dim": (128, 320)},
        {"use": "blocks", "kind": "cross", "mode": "never"},
        {"use": "quant", "provider": "triton", "mode": "never"},
        {"use": "dense", "mode": "require"},
        {"use": "quant,blocks", "params": {"bits": 8, "keep_ratio": 0.2}},
        {"use": "quant,plain", "provider": "fused"},
    ],
)
def test_rules_that_something_can_satisfy_are_accepted(given):
    rule = Rule(**given)
    assert rule.use == tuple(given["use"].split(","))
    assert Rule(**rule.to_dict()) == rule


def test_impossible_dtype_is_refused(monkeypatch):
    from support.made_up_backends import PLAIN

    from sparseattn.attn_ops import registry
    from sparseattn.attn_ops.spec import Support

    halves = Support(dtypes=(torch.float16,))
    monkeypatch.setitem(registry._backends, "half", dataclasses.replace(PLAIN, name="half", support=halves))
    with pytest.raises(PolicyError, match="half takes float16, not float32"):
        Rule("half", dtype="float32")


def test_policy_is_a_value():
    policy = Policy([Rule("plain")], "mine")
    assert policy.rules == (Rule("plain"),)
    assert policy == Policy((Rule("plain"),), "mine")
    assert hash(policy) == hash(Policy((Rule("plain"),), "mine"))
    assert policy != Policy([Rule("quant")], "mine")
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_hash_is_stable():
    """A hash is written down in files and reports: it must not change between machines and releases."""
    rule = Rule("blocks,plain", modules="a.*", kind="self", min_seq=1024, params={"keep_ratio": 0.4})
    assert Policy([rule]).hash == "c32fbd6bc17c"
    assert Policy([]).hash == "1788f993b477"


def test_hash_follows_what_decides():
    base = Policy([Rule("quant", min_seq=9)])
    same = [Policy([Rule("quant", min_seq=9)], "other"), Policy([Rule("quant", min_seq=9, why="because")])]
    other = [Policy([Rule("quant", min_seq=8)]), Policy([Rule("quant", min_seq=9)] * 2), Policy([])]
    assert {policy.hash for policy in same} == {base.hash}
    assert base.hash not in {policy.hash for policy in other}


def test_hash_follows_the_order_of_rules():
    first, second = Rule("plain", min_seq=9), Rule("quant")
    assert Policy([first, second]).hash != Policy([second, first]).hash


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"rules": "plain"}, "rules must be a list of Rule, got 'plain'"),
        ({"rules": ["plain"]}, "rules must be a list of Rule"),
        ({"rules": Rule("dense")}, "rules must be a list of Rule"),
        ({"rules": [], "name": 3}, "name must be a str, got 3"),
        ({"rules": [], "version": 2}, "version must be 1, the newest that this release reads, got 2. Update"),
        ({"rules": [], "version": "1"}, "version must be 1"),
        ({"rules": [], "version": True}, "version must be 1"),
    ],
)
def test_policy_arguments_are_checked(arguments, problem):
    with pytest.raises(PolicyError) as raised:
        Policy(**arguments)
    assert problem in str(raised.value)
