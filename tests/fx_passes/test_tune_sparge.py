"""tune_sparge: within the bounds on every sample, as sparse as that allows, the same every time, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import fresh_dynamo  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparseattn
from sparseattn import Policy, Sample, SpargeTuning
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.fx_passes.sparge_search import least
from sparseattn.lowering.sparge_tuning import SpargeSite

SEQ, HEADS, DIM = 256, 4, 16
PARAMS = {"block_q": 32, "block_k": 16}
FEW = (-1.0, 0.25, 0.5)


class Attention(nn.Module):
    """Self-attention whose heads are sharp or flat: what a sharp head sees is in few blocks."""

    def __init__(self, sharpness: list[float], kv_heads: int = HEADS, **arguments: Any) -> None:
        super().__init__()
        self.sharpness, self.arguments = torch.tensor(sharpness).view(1, -1, 1, 1), arguments
        self.q = nn.Linear(HEADS * DIM, len(sharpness) * DIM)
        self.k, self.v = (nn.Linear(HEADS * DIM, kv_heads * DIM) for _ in range(2))
        self.out = nn.Linear(len(sharpness) * DIM, HEADS * DIM)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return q * self.sharpness.to(q.dtype), k, v

    def forward(self, x: Tensor) -> Tensor:
        out = scaled_dot_product_attention(*self.operands(x), **self.arguments)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """One layer of sharp and flat heads, one of sharp ones, one of flat ones."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Attention, ([0.1, 4.0, 4.0, 0.1], [8.0] * 4, [0.1] * 4)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def smooth(seed: int, batch: int = 1) -> Tensor:
    """Tokens that change slowly, as those of a picture do: near ones attend to each other."""
    noise = torch.randn(batch, SEQ, HEADS * DIM, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(dim=1) / 8


SAMPLES = [(smooth(seed),) for seed in range(3)]


def tuned(model: Any, samples: Any = None, **options: Any) -> SpargeTuning:
    given = SAMPLES if samples is None else samples
    return sparseattn.tune_sparge(
        model, given, **{"params": PARAMS, "similarities": FEW, "pv_l1": None, "progress": False, **options}
    )


@torch.no_grad()
def visits(model: nn.Module, x: Tensor) -> list[tuple[str, Attention, tuple[Tensor, Tensor, Tensor]]]:
    """Every layer with the operands of its attention, when the model runs with dense attention."""
    inputs: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Attention)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return [(name, layer, layer.operands(inputs[name])) for name, layer in layers.items()]


def sparge(site: SpargeSite, layer: Attention, operands: tuple[Tensor, ...], **other: Any) -> Tensor:
    thresholds = {"masses": site.mass, "similarities": site.similarity, "pv_thresholds": site.pv_threshold}
    given = {name: torch.tensor(values) for name, values in thresholds.items() if values}
    causal = layer.arguments.get("is_causal", False)
    return sparseattn.ops.sparge_attention(*operands, **PARAMS, **{"causal": causal, **given, **other})[0]


def errors(site: SpargeSite, layer: Attention, operands: tuple[Tensor, ...], **other: Any) -> list[float]:
    """Relative L1 of every head, in fp64."""
    exact = scaled_dot_product_attention(*(x.double() for x in operands), **layer.arguments)
    wrong = (sparge(site, layer, operands, **other).double() - exact).abs().sum(dim=(0, 2, 3))
    return (wrong / exact.abs().sum(dim=(0, 2, 3))).tolist()


def kept(site: SpargeSite, operands: tuple[Tensor, ...], **other: Any) -> list[float]:
    """Share of the blocks that every head keeps."""
    thresholds = {"masses": torch.tensor(site.mass), "similarities": torch.tensor(site.similarity)}
    _, count = sparseattn.ops.sparge_block_map(*operands[:2], **PARAMS, **{**thresholds, **other})
    blocks = SEQ // PARAMS["block_k"]
    return (count.float().mean(dim=(0, 2)) / blocks).tolist()


@pytest.mark.parametrize("bounds", [(0.03, None), (0.07, 0.08), (0.2, 0.25)])
def test_every_head_is_within_the_bounds_on_every_sample(model: Model, bounds: tuple[float, float | None]) -> None:
    l1, pv_l1 = bounds
    tuning = tuned(model, l1=l1, pv_l1=pv_l1)
    assert [site.module for site in tuning.sites] == ["blocks.0", "blocks.1", "blocks.2"]
    by_module = {site.module: site for site in tuning.sites if any(site.sparse)}
    assert {"blocks.0", "blocks.1"} <= set(by_module)
    largest: dict[str, list[list[float]]] = {}
    for (x,) in SAMPLES:
        for name, layer, operands in visits(model, x):
            if name in by_module:
                site = by_module[name]
                largest.setdefault(name, []).append(errors(site, layer, operands))
                # The second stage comes on top of thresholds that are within l1 by themselves.
                assert max(errors(site, layer, operands, pv_thresholds=None)) < l1
    for name, found in largest.items():
        worst = [max(column) for column in zip(*found, strict=True)]
        assert max(worst) < (pv_l1 or l1)
        assert by_module[name].error == pytest.approx(worst, rel=1e-3)


def test_sharp_heads_are_sparse_and_flat_ones_keep_every_block(model: Model) -> None:
    tuning = tuned(model)
    mixed, sharp, flat = tuning.sites
    assert mixed.sparse == (False, True, True, False)
    assert sharp.sparse == (True,) * 4
    assert all(
        share > 0.1
        for site in (mixed, sharp)
        for share, is_one in zip(site.sparsity, site.sparse, strict=True)
        if is_one
    )
    assert (mixed.mass[0], mixed.sparsity[0]) == (1.0, 0.0)
    assert flat.sparse == (False,) * 4
    assert flat.why == "no head leaves out more than a tenth of the blocks"
    assert [rule.modules for rule in tuning.rules()] == [("blocks.0",), ("blocks.1",)]


def test_sparsity_is_the_mean_over_the_samples(model: Model) -> None:
    tuning = tuned(model)
    shares = [
        kept(tuning.sites[1], operands)
        for (x,) in SAMPLES
        for name, _, operands in visits(model, x)
        if name == "blocks.1"
    ]
    mean = [1 - sum(column) / len(column) for column in zip(*shares, strict=True)]
    assert tuning.sites[1].sparsity == pytest.approx(mean, abs=1e-6)


def test_no_other_mass_that_is_within_keeps_fewer_blocks(model: Model) -> None:
    """Against every mass of a grid, one at a time; a block more or less is what the width of the search may cost."""
    (site, *_) = tuned(model, SAMPLES[:1], similarities=(-1.0,)).sites
    _, layer, operands = visits(model, SAMPLES[0][0])[0]
    best = [1.0] * HEADS
    for number in range(257):
        mass = torch.full((HEADS,), number / 256)
        within = [error < 0.07 for error in errors(site, layer, operands, masses=mass)]
        shares = kept(site, operands, masses=mass)
        best = [min(old, new) if ok else old for old, new, ok in zip(best, shares, within, strict=True)]
    one_block = 1 / (SEQ // PARAMS["block_q"]) / (SEQ // PARAMS["block_k"])
    for head in (1, 2):
        assert 1 - site.sparsity[head] <= best[head] + one_block


def test_a_larger_bound_is_sparser(model: Model) -> None:
    shares = [tuned(model, l1=l1).sparsity for l1 in (0.02, 0.07, 0.2)]
    assert shares == sorted(shares)
    assert len(set(shares)) == 3


def test_the_second_stage_skips_as_much_as_its_bound_allows(model: Model) -> None:
    """With half the threshold of a head, its error is beyond the bound."""
    mixed, sharp, _ = tuned(model, SAMPLES[:1], pv_l1=0.072).sites
    beyond = []
    for site, (_, layer, operands) in zip((mixed, sharp), visits(model, SAMPLES[0][0]), strict=False):
        halved = errors(site, layer, operands, pv_thresholds=torch.tensor(site.pv_threshold) / 2)
        searched = [head for head, threshold in enumerate(site.pv_threshold) if 0.2 < threshold < 50]
        beyond += [halved[head] >= 0.072 for head in searched]
    assert len(beyond) >= 2
    assert all(beyond)


def test_one_sample_is_not_enough_for_another(model: Model) -> None:
    """What the other samples raise is needed: thresholds of the first alone are beyond the bound on them."""
    alone = tuned(model, SAMPLES[:1]).sites[1]
    assert any(
        max(errors(alone, layer, operands)) > 0.07
        for (x,) in SAMPLES[1:]
        for name, layer, operands in visits(model, x)
        if name == "blocks.1"
    )


def test_the_same_every_time_and_whatever_form_a_sample_has(model: Model) -> None:
    few = {"similarities": (-1.0, 0.5), "pv_l1": 0.08}
    first = tuned(model, **few)
    assert tuned(model, [{"x": x} for (x,) in SAMPLES], **few) == first
    assert tuned(model, iter([Sample((x,), step=3) for (x,) in SAMPLES]), **few) == first


def test_a_similarity_test_is_used_where_it_is_sparser(model: Model) -> None:
    """A head keeps the fewest blocks of those that each threshold by itself would find."""
    together = tuned(model, SAMPLES[:1]).sites[1]
    apart = [tuned(model, SAMPLES[:1], similarities=(one,)).sites[1] for one in FEW]
    for head in range(HEADS):
        best = max(range(len(FEW)), key=lambda row: (apart[row].sparsity[head], -row))
        assert together.sparsity[head] == apart[best].sparsity[head]
        assert together.mass[head] == apart[best].mass[head]
        assert together.similarity[head] == FEW[best]


def test_the_rules_are_one_graph_that_gives_what_the_op_gives(model: Model) -> None:
    tuning = tuned(model, pv_l1=0.08)
    assert all(site.pv_threshold for site in tuning.sites if any(site.sparse))
    options = {"policy": Policy(tuning.rules(mode="require")), "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", fullgraph=True, options=options)
    x = smooth(7)
    with torch.no_grad():
        ours = compiled(x)
        expected = x
        for block, site in zip(model.blocks, tuning.sites, strict=True):
            if any(site.sparse):
                out = sparge(site, block, block.operands(expected))
                expected = expected + block.out(out.transpose(1, 2).flatten(2))
            else:
                expected = block(expected)
    torch.testing.assert_close(ours, expected)
    report = sparseattn.last_report()
    assert report is not None
    assert [row.decision.backend for row in report.rows] == ["sparge", "sparge", None]
    assert not torch.equal(ours, model(x))


def test_steps_may_be_tuned_apart(model: Model) -> None:
    early, late = (tuned(model, SAMPLES[:1], l1=l1) for l1 in (0.02, 0.2))
    policy = Policy([*early.rules(steps=":1"), *late.rules(steps="1:")])
    compiled = torch.compile(model, backend="sparseattn", options={"policy": policy, "inner_backend": "eager"})
    with torch.no_grad():
        apart = [compiled(SAMPLES[0][0]) for _ in sparseattn.steps([10, 20])]
        for tuning, ours in zip((early, late), apart, strict=True):
            options = {"policy": Policy(tuning.rules()), "inner_backend": "eager"}
            torch._dynamo.reset()
            alone = torch.compile(model, backend="sparseattn", options=options)(SAMPLES[0][0])
            torch.testing.assert_close(ours, alone)
    assert not torch.equal(*apart)


@pytest.mark.parametrize("arguments", [{"is_causal": True}, {"enable_gqa": True}, {"scale": 0.5}])
def test_what_a_site_asks_is_what_is_compared(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Attention([4.0] * 4, kv_heads=2 if "enable_gqa" in arguments else HEADS, **arguments).eval()
    holder = nn.Sequential(model)
    (site,) = tuned(holder, SAMPLES[:1]).sites
    scale = {"scale": arguments["scale"]} if "scale" in arguments else {}
    (_, layer, operands), *_ = visits(holder, SAMPLES[0][0])
    assert site.sparse == (True,) * 4
    assert site.error == pytest.approx(errors(site, layer, operands, **scale), rel=1e-3)
    assert max(site.error) < 0.07


def test_under_causality_sparsity_is_that_of_the_visible_blocks() -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(Attention([0.0] * 4, is_causal=True)).eval()
    (site,) = tuned(holder, SAMPLES[:1], l1=1e-2).sites
    assert site.sparse == (False,) * 4  # a uniform head leaves out nothing, though the mask leaves out half


def test_where_rounding_alone_is_beyond_the_bound_a_site_stays_dense(model: Model) -> None:
    tuning = tuned(model, l1=1e-3, similarities=(-1.0,))
    assert tuning.rules() == []
    sharp = tuning.sites[1]
    assert (sharp.error, sharp.sparsity) == ((0.0,) * 4, (0.0,) * 4)


def test_a_head_that_nothing_serves_keeps_its_site_dense() -> None:
    """One head could leave out blocks, as its values are all the same; rounding alone is too much for the other."""
    torch.manual_seed(0)
    attention = Attention([0.0, 8.0], kv_heads=2).eval()
    with torch.no_grad():
        attention.v.weight[:DIM] = 0.0
    sharp, alike = (tuned(nn.Sequential(attention), SAMPLES[:1], l1=l1).sites[0] for l1 in (2e-3, 0.05))
    assert alike.sparse[0]
    assert not any(sharp.sparse)
    assert sharp.why.startswith("head 1 has the relative L1 0.0")
    assert sharp.why.endswith("with every block kept")


def test_nan_is_within_no_bound(model: Model) -> None:
    tuning = tuned(model, [*SAMPLES[:1], (smooth(1) * float("nan"),)], similarities=(-1.0,))
    assert tuning.rules() == []


def test_modules_choose_what_is_tuned(model: Model) -> None:
    assert [site.module for site in tuned(model, SAMPLES[:1], modules="*.1").sites] == ["blocks.1"]


def test_a_model_that_is_tuned_is_not_changed(model: Model) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = model(SAMPLES[0][0])
    tuned(model, SAMPLES[:1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(SAMPLES[0][0]), dense)


def test_a_module_that_runs_twice_is_within_at_both() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention([4.0] * 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(self.attn(x) * 3)

    model = Twice().eval()
    (site,) = tuned(model, SAMPLES[:1]).sites
    with torch.no_grad():
        again = model.attn(SAMPLES[0][0]) * 3
        for x in (SAMPLES[0][0], again):
            assert max(errors(site, model.attn, model.attn.operands(x))) < 0.07


def within(*good: float) -> Callable[[Tensor], Tensor]:
    """Per head: from this value on."""
    return lambda tried: tried >= torch.tensor(good)


def test_least_finds_the_edge_of_every_head() -> None:
    start, limit = torch.tensor([0.0, 0.5, 0.0, 0.0]), torch.ones(4)
    found = least(within(0.3, 0.25, 0.0, 2.0), start, limit, 2**-10)
    assert found[0] == pytest.approx(0.3, abs=2**-10)
    assert found[0] >= 0.3
    assert found[1:].tolist() == [0.5, 0.0, 1.0]  # its start, its start, its limit


def test_least_gives_nothing_that_was_not_within() -> None:
    """Where what is within comes and goes, it finds one that is, or the limit."""
    for seed in range(20):
        good = torch.rand(4, 1025, generator=torch.Generator().manual_seed(seed)) < 0.3
        found = least(
            lambda tried, good=good: good.gather(1, (tried * 1024).long().unsqueeze(1)).squeeze(1),
            *(torch.zeros(4), torch.ones(4), 2**-10),
        )
        for head, value in enumerate(found.tolist()):
            assert value == 1.0 or good[head, int(value * 1024)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"l1": 0.0}, r"l1 must be a positive number, a relative L1, got 0\.0"),
        ({"l1": "7%"}, "l1 must be a positive number, a relative L1, got '7%'"),
        ({"pv_l1": 0.07}, r"pv_l1 must be a number larger than l1 0\.07, or None for no second stage, got 0\.07"),
        ({"pv_l1": float("nan")}, r"pv_l1 must be a number larger than l1"),
        ({"samples": []}, r"no samples\. Give at least one tuple of the model's inputs"),
        ({"samples": [3]}, "a sample is a tuple of arguments, a dict of keyword arguments or a Sample, got int"),
        ({"similarities": ()}, r"similarities must be a list of numbers, got \(\)"),
        ({"similarities": (2.0,)}, r"similarities must be in -1 \.\.\. 1, got 2\.0"),
        ({"params": {"mass": 0.9}}, "params: mass is what is tuned"),
        ({"params": {"block_m": 64}}, "sparge has no parameter 'block_m'"),
        ({"modules": "text.*"}, r"no self-attention of this model can be served\.\n  blocks\.0: .*no rule"),
    ],
)
def test_bad_arguments_are_named(model: Model, options: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        tuned(model, **options)


def test_a_model_without_a_site_says_so() -> None:
    with pytest.raises(PolicyError, match="no self-attention of this model can be served"):
        tuned(nn.Linear(HEADS * DIM, 4), SAMPLES[:1])
    with pytest.raises(PolicyError, match=r"in no module: the attention of test_tune_sparge\.py:\d+ is in no module"):
        tuned(lambda x: scaled_dot_product_attention(x[None], x[None], x[None]), SAMPLES[:1])


def test_heads_that_differ_between_calls_are_refused(model: Model) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for heads in (4, 2):
                q = x.unflatten(-1, (heads, -1)).transpose(1, 2)
                x = x + scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
            return x

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(x)

    with pytest.raises(PolicyError, match=r"sites of odd have 4 and 2 heads\. Leave it out, by modules"):
        tuned(Holder(), SAMPLES[:1])


def test_what_never_settles_keeps_every_block(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a last round that is the first, no more is known than that nothing needed to rise, or that it did."""
    monkeypatch.setattr("sparseattn.fx_passes.tune_sparge._ROUNDS", 1)
    for site in tuned(model, l1=0.3).sites:
        assert set(site.mass) <= {0.0, 1.0}


def test_samples_may_differ_in_length(model: Model) -> None:
    short = smooth(5)[:, :192]
    (_, site, _) = tuned(model, [*SAMPLES[:1], (short,)]).sites
    assert any(site.sparse)
    for x in (SAMPLES[0][0], short):
        _, layer, operands = visits(model, x)[1]
        assert max(errors(site, layer, operands)) < 0.07


def test_half_precision_leaves_the_thresholds_fp32(model: Model) -> None:
    (x,) = SAMPLES[0]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = tuned(model, SAMPLES[:1])
    for tuning in (under_autocast, tuned(model.bfloat16(), [(x.bfloat16(),)])):
        site = tuning.sites[1]
        assert site.sparse == (True,) * 4
        assert any(torch.tensor(value).bfloat16().item() != value for value in site.mass)
