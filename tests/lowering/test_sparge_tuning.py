"""SpargeTuning: its rules, its file, and what SpargeAttn's own tuning saved."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseattn import Policy, SpargeTuning
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.lowering.sparge_tuning import SpargeSite

STATE = ("is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd")


def site(module: str = "blocks.0.attn1", heads: int = 3, **fields: Any) -> SpargeSite:
    draw = random.Random(module)
    numbers = {
        "mass": [draw.random() for _ in range(heads)],
        "similarity": [draw.uniform(-1, 1) for _ in range(heads - 1)] + [0.5],
        "pv_threshold": [draw.uniform(0, 50) for _ in range(heads)],
        "sparse": [True] * heads,
    }
    return SpargeSite(module, **{**numbers, **fields})


def tuning() -> SpargeTuning:
    dense = site("blocks.1.attn1", sparse=[False] * 3, why="nothing to gain")
    measured = site("blocks.2.attn1", sparsity=[0.1, 0.2, 0.3], error=[0.01, 0.02, 0.07], pv_threshold=())
    params = {"block_q": 64, "sink": True}
    return SpargeTuning([site(), dense, measured], params, l1=0.07, pv_l1=0.08, note="of a test")


class InnerAttention(nn.Module):
    """The state of upstream's SparseAttentionMeansim."""

    def __init__(self, heads: int, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        values = {
            "is_sparse": torch.rand(heads, generator=random) < 0.8,
            "cdfthreshd": torch.rand(heads, generator=random),
            "simthreshd1": 2 * torch.rand(heads, generator=random) - 1,
            "simthreshd2": torch.zeros(heads),
            "pvthreshd": 50 * torch.rand(heads, generator=random),
        }
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))


def upstream(*paths: str, heads: int = 4) -> dict[str, Tensor]:
    """What extract_sparse_attention_state_dict gives of a model that has these inner attentions."""
    model = nn.Module()
    for seed, path in enumerate(paths):
        owner = model
        *above, last = path.split(".")
        for name in above:
            if not hasattr(owner, name):
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        owner.add_module(last, InnerAttention(heads, seed))
    return dict(model.state_dict())


WAN = ("blocks.0.self_attn.inner_attention", "blocks.1.self_attn.inner_attention")
FLUX = ("transformer_blocks.1.attn.inner_attention", "single_transformer_blocks.1.attn.inner_attention")


def test_every_sparse_site_has_a_rule_with_a_number_for_each_head() -> None:
    first, last = tuning().rules()
    assert (first.use, first.modules, first.kind, first.mode) == (("sparge",), ("blocks.0.attn1",), "self", "prefer")
    assert first.why == "SpargeAttention tuned within l1 0.07"
    site = tuning().sites[0]
    assert dict(first.params) == {
        "block_q": 64,
        "sink": True,
        "mass": site.mass,
        "similarity": site.similarity,
        "pv_threshold": site.pv_threshold,
    }
    assert last.modules == ("blocks.2.attn1",)
    assert "pv_threshold" not in dict(last.params)
    assert [rule.mode for rule in tuning().rules(mode="require")] == ["require", "require"]
    assert [rule.steps for rule in tuning().rules(steps="10:")] == ["10:", "10:"]


def test_what_is_the_same_for_all_heads_is_one_number_and_what_tests_nothing_is_left_out() -> None:
    alike = site(mass=[0.5] * 3, similarity=[-1.0, -0.25, 0.0], pv_threshold=[2.0] * 3)
    assert dict(SpargeTuning([alike]).rules()[0].params) == {"mass": 0.5, "pv_threshold": 2.0}


def test_a_path_is_no_glob() -> None:
    (rule,) = SpargeTuning([site("heads[0].attn")]).rules()
    assert rule.modules == ("heads[[]0].attn",)


def test_rules_survive_a_policy_file(tmp_path: Path) -> None:
    policy = Policy(tuning().rules())
    policy.save(tmp_path / "tuned.toml")
    assert Policy.load(tmp_path / "tuned.toml").rules == policy.rules


def test_a_file_gives_the_same_numbers_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    tuning().save(path)
    assert SpargeTuning.load(path) == tuning()
    for site in SpargeTuning.load(path).sites:
        for value in (*site.mass, *site.similarity, *site.pv_threshold):
            assert torch.tensor(value, dtype=torch.float32).item() == value
    assert list(json.loads(path.read_text())["sites"]) == ["blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1"]
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version must be 1, the only one that this release reads, got 2. Tune again"),
        ({"version": None}, "version must be 1, .*got None"),
        ({"l2": 1}, r"unknown key 'l2'\. Known: l1, note"),
        ({"l1": "small"}, "l1 must be a number or null, got 'small'"),
        ({"note": 3}, "note must be a str, got 3"),
        ({"sites": []}, r"sites must be a table of modules, got \[\]"),
        ({"sites": {"a": {"mass": [0.5], "similarity": [0.5]}}}, "site a: sparse is missing"),
        ({"sites": {"a": {"cdf": [0.5]}}}, "site a: unknown key 'cdf'"),
        (
            {"sites": {"a": {"mass": [0.5], "similarity": [float("nan")], "sparse": [True]}}},
            r"a: similarity must be finite and in -1 \.\.\. 1, got nan",
        ),
        ({"params": {"mass": 0.5}}, "params: mass is what is tuned. Remove it"),
        ({"params": {"block_q": 7}}, "block_q must be one of"),
    ],
)
def test_mistakes_in_a_file_are_named_and_it_stays_as_it_was(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    tuning().save(path)
    text = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError, match=rf"tuned\.json: .*{says}"):
        SpargeTuning.load(path)
    assert path.read_text(encoding="utf-8") == text


def test_a_file_is_json_by_name_and_content(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"a sparge tuning is a \.json file, got '\.pt'\. Rename it"):
        tuning().save(tmp_path / "tuned.pt")
    assert not list(tmp_path.iterdir())
    with pytest.raises(PolicyError, match=r"missing\.json: cannot be read"):
        SpargeTuning.load(tmp_path / "missing.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PolicyError, match=r"list\.json: sparge tuning must be a table, got \[\]"):
        SpargeTuning.load(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mass": [0.5, 0.5]}, "similarity must have a number for each of 2 heads, got 3"),
        ({"sparse": [True]}, "sparse must have a number for each of 3 heads, got 1"),
        ({"mass": []}, r"mass must be a list of numbers, got \[\]"),
        ({"mass": [0.5, 0.5, 1.5]}, r"mass must be finite and in 0 \.\.\. 1, got 1\.5"),
        ({"pv_threshold": [1.0, 2.0, -1.0]}, r"pv_threshold must be finite and in 0 \.\.\. 1e\+06, got -1\.0"),
        ({"error": [0.1, 0.1, float("inf")]}, "error must be finite"),
        ({"sparse": [1, 1, 1]}, r"sparse must be a list of bool, got \[1, 1, 1\]"),
        ({"why": None}, "why must be a str, got None"),
    ],
)
def test_wrong_numbers_are_named_with_their_module(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=rf"sparge tuning: blocks\.0\.attn1: {says}"):
        site(**fields)


def test_a_module_has_one_site() -> None:
    with pytest.raises(PolicyError, match=r"sparge tuning: blocks\.0\.attn1 comes twice"):
        SpargeTuning([site(), site()])
    with pytest.raises(PolicyError, match="module must be the path of a module, got ''"):
        site("")
    with pytest.raises(PolicyError, match="sites must be a list of SpargeSite, got 3"):
        SpargeTuning(3)  # type: ignore[arg-type]


def test_it_prints_what_is_sparse_and_why_not() -> None:
    assert str(tuning()).splitlines() == [
        "3 layers, 6 of 9 heads sparse",
        "note: of a test",
        "  blocks.0.attn1: 3 of 3 heads sparse",
        "  blocks.1.attn1: dense, nothing to gain",
        "  blocks.2.attn1: 3 of 3 heads sparse, sparsity 20.0%, error up to 0.070",
    ]
    assert SpargeTuning([tuning().sites[2]]).sparsity == pytest.approx(0.2)


def test_upstreams_state_is_read_by_module_and_head() -> None:
    state = upstream(*WAN)
    imported = SpargeTuning.from_upstream(state)
    assert [site.module for site in imported.sites] == ["blocks.0.self_attn", "blocks.1.self_attn"]
    assert dict(imported.params) == {"sink": True}
    assert imported.note == ""
    for site, path in zip(imported.sites, WAN, strict=True):
        assert list(site.mass) == state[f"{path}.cdfthreshd"].tolist()
        assert list(site.similarity) == state[f"{path}.simthreshd1"].tolist()
        assert list(site.pv_threshold) == state[f"{path}.pvthreshd"].tolist()
        assert list(site.sparse) == state[f"{path}.is_sparse"].tolist()
    without = {key: value for key, value in state.items() if not key.endswith("simthreshd2")}
    assert SpargeTuning.from_upstream(without) == imported


def test_a_path_that_contains_another_keeps_its_own_numbers() -> None:
    """Upstream's loader gives `transformer_blocks.1` what was saved for `single_transformer_blocks.1`."""
    state = upstream(*FLUX)
    imported = {site.module: site for site in SpargeTuning.from_upstream(state).sites}
    assert set(imported) == {"transformer_blocks.1.attn", "single_transformer_blocks.1.attn"}
    for path in FLUX:
        assert list(imported[path.removesuffix(".inner_attention")].mass) == state[f"{path}.cdfthreshd"].tolist()


def test_modules_say_what_a_path_is_called_here() -> None:
    modules = {
        "blocks.{}.self_attn.inner_attention": "blocks.{}.attn1",
        "stage.{}.{}.inner_attention": "deep.{}.at.{}",
    }
    state = upstream(*WAN, "stage.3.12.inner_attention")
    imported = SpargeTuning.from_upstream(state, modules=modules, params={"pv": "fp8"})
    assert [site.module for site in imported.sites] == ["blocks.0.attn1", "blocks.1.attn1", "deep.3.at.12"]
    assert dict(imported.params) == {"pv": "fp8"}


def test_the_wrapper_of_a_compiled_model_is_no_part_of_a_path() -> None:
    (site,) = SpargeTuning.from_upstream(upstream("_orig_mod.blocks.0._orig_mod.attn1.inner_attention")).sites
    assert site.module == "blocks.0.attn1"


def test_layers_that_were_not_sparse_have_no_rule() -> None:
    state = upstream(*WAN)
    state[f"{WAN[0]}.is_sparse"] = torch.zeros(4, dtype=torch.bool)
    imported = SpargeTuning.from_upstream(state)
    assert imported.sites[0].why == "not sparse in upstream's tuning"
    assert [rule.modules for rule in imported.rules()] == [("blocks.1.self_attn",)]


def test_half_precision_is_read_and_what_it_lost_is_noted() -> None:
    """Upstream's loader casts thresholds to the dtype of the model, and a model is saved with them."""
    exact = upstream(*WAN)
    imported = SpargeTuning.from_upstream({key: value.bfloat16() for key, value in exact.items()})
    rounded = [abs(a - b) for a, b in zip(imported.sites[0].mass, exact[f"{WAN[0]}.cdfthreshd"].tolist(), strict=True)]
    assert 0 < max(rounded) <= 2**-9
    assert "read from bfloat16, which rounded cdfthreshd to 0.002, simthreshd1 to 0.00098, pvthreshd to 0.12" in (
        imported.note
    )
    assert [site.sparse for site in imported.sites] == [tuple(exact[f"{path}.is_sparse"].tolist()) for path in WAN]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cdfthreshd": None}, "cdfthreshd is missing"),
        ({"pvthreshd": None}, "pvthreshd is missing"),
        ({"is_sparse": None}, "is_sparse is missing"),
        ({"topk": torch.zeros(4)}, "topk is not of a tuning, whose names end in is_sparse, cdfthreshd"),
        (
            {"cdfthreshd": torch.tensor([0.5, float("nan"), 0.5, 0.5])},
            r"cdfthreshd must be in 0 \.\.\. 1, got nan for head 1",
        ),
        (
            {"cdfthreshd": torch.tensor([0.5, 0.5, 1.25, 0.5])},
            r"cdfthreshd must be in 0 \.\.\. 1, got 1\.25 for head 2",
        ),
        (
            {"pvthreshd": torch.tensor([5.0, 5.0, 5.0, -1.0])},
            r"pvthreshd must be in 0 \.\.\. 1e\+06, got -1\.0 for head 3",
        ),
        (
            {"pvthreshd": torch.tensor(20.0)},
            r"pvthreshd must be a tensor with a number for each head, as is_sparse, got \(\)",
        ),
        ({"simthreshd1": torch.zeros(3)}, r"simthreshd1 must be a tensor with a number for each head, .*got \(3,\)"),
        ({"simthreshd1": 0.5}, "simthreshd1 must be a tensor .*got float"),
        ({"is_sparse": torch.tensor([1.0, 0.0, 0.5, 1.0])}, r"is_sparse must be 0 or 1, got 0\.5 for head 2"),
        ({"is_sparse": True}, "is_sparse must be a tensor .*got bool"),
    ],
)
def test_mistakes_in_a_state_name_the_key(change: dict[str, Any], says: str) -> None:
    state: dict[str, Any] = upstream(*WAN)
    for name, value in change.items():
        key = f"{WAN[1]}.{name}"
        state = {k: v for k, v in state.items() if k != key} if value is None else {**state, key: value}
    with pytest.raises(PolicyError, match=rf"from_upstream: blocks\.1\.self_attn\.inner_attention\.{says}"):
        SpargeTuning.from_upstream(state)


def test_paths_that_cannot_be_mapped_are_named() -> None:
    with pytest.raises(PolicyError, match="from_upstream: the state dict is empty"):
        SpargeTuning.from_upstream({})
    with pytest.raises(PolicyError, match=r"attn\.sparse is not a module's inner_attention\. Give modules"):
        SpargeTuning.from_upstream(upstream("attn.sparse"))
    with pytest.raises(PolicyError, match=r"blocks\.0\.self_attn\.inner_attention is not among modules"):
        SpargeTuning.from_upstream(upstream(*WAN), modules={"blocks.{}.attn": "blocks.{}.attn1"})
    with pytest.raises(PolicyError, match=r"both sides have \{\} for every number"):
        SpargeTuning.from_upstream(upstream(*WAN), modules={WAN[0].replace("0", "{}"): "attn1"})
    with pytest.raises(PolicyError, match=r"blocks\.1\.self_attn.* and blocks\.0\.self_attn.* both become attn1"):
        SpargeTuning.from_upstream(upstream(*WAN), modules=dict.fromkeys(WAN, "attn1"))
