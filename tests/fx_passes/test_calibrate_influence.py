"""What calibration takes an error at a site for: what it does to the model's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseattn
from sparseattn import Rule
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.fx_passes.calibration.candidates import expand
from sparseattn.fx_passes.calibration.influence import Influence
from sparseattn.fx_passes.calibration.ledger import Ledger, Place
from sparseattn.fx_passes.calibration.output_error import Metric, OutputError, as_size, within
from sparseattn.fx_passes.calibration.samples import Samples
from sparseattn.fx_passes.calibration.search import Aims

SEQ, HEADS, DIM = 128, 4, 16
RATIOS = (1.0, 0.75, 0.5, 0.25, 0.125)
LADDER = [Rule("block_topk", params={"keep_ratio": ratio, "block_q": 16, "block_k": 16}) for ratio in RATIOS]


class Attention(nn.Module):
    """Self-attention of which every head counts for the output as `gains` say."""

    def __init__(self, gains: list[float]) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.gains = torch.tensor(gains).view(1, HEADS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(4 * q, k, v)
        return x + (self.gains * out).transpose(1, 2).flatten(2)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention([1.0, 1.0, 0.1, 0.1]), Attention([0.01] * HEADS)).eval()


def calls(count: int = 8) -> list[tuple[Tensor]]:
    return [(torch.randn(2, SEQ, HEADS * DIM, generator=torch.Generator().manual_seed(i)),) for i in range(count)]


def weights(model: nn.Module, samples: list[Any]) -> dict[str, list[float]]:
    ledger = Ledger()
    ledger.output = 1.0
    influence = Influence(model, Samples.of(samples, None, 1), expand(LADDER), ledger)
    assert sum(1 for _ in influence.add(0)) == len(samples)
    return {module: ledger.weights(Place(module, "self", 0)) for module in ("0", "1")}


def test_is_the_square_of_what_an_error_does_to_the_output(model: nn.Module) -> None:
    """The last site's is its gain to the output, squared; those of the first pass through the second as well."""
    found = weights(model, calls())
    assert found["1"] == pytest.approx([1e-4] * HEADS, rel=0.5)
    assert found["0"] == pytest.approx([1.0, 1.0, 0.01, 0.01], rel=0.5)


def test_no_parameter_has_a_gradient_afterwards(model: nn.Module) -> None:
    model.requires_grad_(True)
    weights(model, calls(1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_heads_that_do_not_count_become_sparse(model: nn.Module) -> None:
    options: dict[str, Any] = {"candidates": LADDER, "objective": "work", "progress": False, "budget": 0.01}
    by_output, by_site = (sparseattn.calibrate(model, calls(), weigh=weigh, **options) for weigh in ("output", "site"))
    ratios = {rule.modules: dict(rule.params)["keep_ratio"] for rule in by_output.rules}
    assert ratios["1",] == 0.125
    assert min(ratios["0",][:2]) > max(ratios["0",][2:])
    assert by_output.measured is not None
    assert by_site.measured is not None
    assert by_output.measured.error <= 0.01
    assert by_output.measured.density < 0.8 * by_site.measured.density


def test_what_each_rule_adds_is_told(model: nn.Module) -> None:
    measured = sparseattn.calibrate(
        model, calls(), budget=0.05, candidates=LADDER, objective="work", progress=False
    ).measured
    assert measured is not None
    squares = sum((rule.error or 0.0) ** 2 for rule in measured.rules)
    assert squares**0.5 == pytest.approx(measured.error, rel=1e-3)
    assert [len(heads) for rule in measured.rules for heads in rule.site_errors] == [HEADS] * len(measured.rules)
    chosen = [(point.error, point.density) for point in measured.points]
    assert any(error == pytest.approx(measured.error, rel=1e-3) for error, _ in chosen)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).detach()


def test_a_model_without_gradients_is_refused() -> None:
    options: dict[str, Any] = {"budget": 0.1, "candidates": LADDER, "progress": False}
    with pytest.raises(PolicyError, match=r'cannot be differentiated: .* Write weigh="site"'):
        sparseattn.calibrate(Detached(), calls(1), **options)
    assert sparseattn.calibrate(Detached(), calls(1), weigh="site", **options).measured is not None


@pytest.mark.parametrize(
    ("metric", "budget"),
    [("relative_l2", 0.03), ("cosine", 1e-3), ("rmse", 0.02), ("mse", 1e-3), ("psnr", 40.0)],
)
def test_every_metric_has_its_budget(model: nn.Module, metric: Metric, budget: float) -> None:
    measured = sparseattn.calibrate(
        model, calls(3), budget=budget, metric=metric, candidates=LADDER, objective="work", progress=False
    ).measured
    assert measured is not None
    assert measured.error is not None
    assert within(measured.error, metric, budget)
    assert measured.density is not None
    assert measured.density < 1.0


def test_metrics() -> None:
    error = OutputError()
    error.add([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 2.0])])
    error.add([torch.tensor([4.0, -1.0])], [torch.tensor([4.0, 1.0])])
    want = {"relative_l1": 3 / 8, "relative_l2": (5 / 22) ** 0.5, "rmse": 1.25**0.5, "mse": 1.25}
    assert {metric: error.in_metric(metric) for metric in want} == pytest.approx(want)
    assert error.in_metric("psnr") == pytest.approx(10 * torch.tensor(9 / 1.25).log10().item())
    assert error.in_metric("cosine") == pytest.approx(1 - 22 / (27 * 22) ** 0.5)


@pytest.mark.parametrize("metric", ["relative_l1", "cosine", "mse", "psnr"])
def test_nan_is_as_bad_as_can_be(metric: Metric) -> None:
    error = OutputError()
    error.add([torch.tensor([torch.nan])], [torch.tensor([1.0])])
    assert as_size(error.in_metric(metric), metric) == torch.inf
    assert not within(error.in_metric(metric), metric, 10.0)


@pytest.mark.parametrize("first", [-20.0, 0.0])
@pytest.mark.parametrize("bend", [0.5, 1.0, 2.0])
def test_aims_find_the_error_that_is_wanted(bend: float, first: float) -> None:
    """Whatever the scale of what is predicted; where it is a step, they end at the step."""
    aims, tries = Aims(-3.0), 0
    while not aims.closed:
        true = bend * (aims.next - first)
        aims.add(true)
        tries += 1
        if aims.is_met(true):
            break
    assert aims.is_met(true)
    assert tries < 25
    aims = Aims(-3.0)
    while not aims.closed:
        aims.add(-1000.0 if aims.next < first else 5.0)
    assert aims.next == pytest.approx(first, abs=0.02)


def test_aims_end_where_nothing_is_large_enough() -> None:
    aims = Aims(-3.0)
    while not aims.closed:
        aims.add(-5.0)
    assert aims.next > 40
