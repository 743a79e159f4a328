"""calibrate: within the budget, better than one setting for all, the same after an interruption, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseattn
from sparseattn import Policy, Rule, Sample
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.fx_passes.calibration import influence, measure
from sparseattn.fx_passes.calibration.candidates import expand
from sparseattn.fx_passes.calibration.choose import choose
from sparseattn.fx_passes.calibration.ledger import DENSE, Ledger, Place, Sums
from sparseattn.fx_passes.calibration.output_error import OutputError
from sparseattn.fx_passes.explain import traced_afresh

SEQ, HEADS, DIM = 256, 4, 16
RATIOS = (0.75, 0.5, 0.25, 0.125)
LADDER = [Rule("block_topk", params={"keep_ratio": ratio, "block_q": 16, "block_k": 16}) for ratio in RATIOS]


class Attention(nn.Module):
    """Self-attention whose heads are sharp or flat: what a sharp head sees is in few blocks."""

    def __init__(self, sharpness: list[float]) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.sharpness = torch.tensor(sharpness).view(1, HEADS, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q * self.sharpness, k, v)
        return x + out.transpose(1, 2).flatten(2)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention([0.1, 4.0, 4.0, 0.1]), Attention([8.0, 8.0, 8.0, 8.0])).eval()


def smooth(seed: int) -> Tensor:
    """Tokens that change slowly, as those of a picture do: near ones attend to each other."""
    noise = torch.randn(1, SEQ, HEADS * DIM, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(dim=1) / 8


def samples(count: int = 3) -> list[tuple[Tensor]]:
    return [(smooth(seed),) for seed in range(count)]


def error_of(model: nn.Module, policy: Policy, given: list[Any]) -> float:
    run = traced_afresh(model, "sparseattn", {"policy": policy, "inner_backend": "eager"})
    with torch.no_grad():
        pairs = [(run(*args), model(*args)) for args in given]
    return float(
        sum((ours - dense).abs().sum() for ours, dense in pairs) / sum(dense.abs().sum() for _, dense in pairs)
    )


def kept(policy: Policy, sites: int = 2) -> float:
    """The mean ratio over all heads of all sites."""
    total = 0.0
    for rule in policy.rules:
        ratio = dict(rule.params)["keep_ratio"]
        total += sum(ratio) / len(ratio) if isinstance(ratio, tuple) else ratio
    return (total + sites - len(policy.rules)) / sites


def calibrated(model: Any, given: Any = None, **options: Any) -> Policy:
    given = samples() if given is None else given
    return sparseattn.calibrate(
        model, given, **{"budget": 0.02, "candidates": LADDER, "objective": "work", "progress": False, **options}
    )


def untimed(policy: Policy) -> Policy:
    """The policy without what a clock told."""
    assert policy.measured is not None
    return replace(policy, measured=replace(policy.measured, speedup=None, date=None))


@pytest.mark.parametrize("budget", [0.005, 0.1, 0.3])
def test_the_true_error_is_within_the_budget_and_told(model: nn.Module, budget: float) -> None:
    policy = calibrated(model, budget=budget)
    assert policy.measured is not None
    error = error_of(model, policy, samples())
    assert error == pytest.approx(policy.measured.error, rel=1e-4, abs=1e-7)
    assert error <= budget == policy.measured.budget
    assert kept(policy) < 1.0
    assert policy.measured.model == sparseattn.fingerprint(model)


def test_more_budget_keeps_less(model: nn.Module) -> None:
    ratios = [kept(calibrated(model, budget=budget)) for budget in (0.005, 0.1, 0.3)]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 3


def test_better_than_one_setting_at_the_same_work(model: nn.Module) -> None:
    """Flat heads get more blocks than sharp ones; a uniform ratio gives all the same."""
    policy = calibrated(model, budget=0.02)
    assert policy.measured is not None
    uniform = Policy([Rule("block_topk", params={"keep_ratio": kept(policy), "block_q": 16, "block_k": 16})])
    assert error_of(model, uniform, samples()) > 1.5 * error_of(model, policy, samples())


def test_a_budget_too_small_for_anything_leaves_all_dense(model: nn.Module) -> None:
    policy = calibrated(model, budget=1e-9)
    assert policy.rules == ()
    assert policy.measured is not None
    assert policy.measured.error == 0.0


def test_by_time_uses_what_was_measured(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dense attention is the fastest by the clock, it stays, whatever the budget."""
    calls = []

    def timed(number: int, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
        calls.append(run)
        return run(), 1.0 if number == DENSE else 2.0

    monkeypatch.setattr(measure, "timed", timed)
    assert calibrated(model, budget=10.0, objective="time").rules == ()
    assert len(calls) == 2 * 3 * (len(LADDER) + 1)


def test_steps_are_served_differently_in_one_graph(model: nn.Module) -> None:
    """Late samples are smoother, so that fewer blocks do; the table follows the steps."""
    given = [Sample((smooth(step) * (0.2 if step < 4 else 1.0),), step=step) for step in range(8)]
    policy = calibrated(model, given, budget=0.1, total_steps=8, buckets=2)
    tables = [dict(rule.params)["keep_ratio"] for rule in policy.rules if rule.steps is None]
    assert tables
    for table in tables:
        assert len(table.values) == 8
        assert len(set(table.values[:4])) == len(set(table.values[4:])) == 1
    assert Policy.load(policy.to_dict()) == policy


def test_an_interrupted_calibration_goes_on(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrated(model)
    state = tmp_path / "state.pt"
    ran: list[int] = []
    probe = measure.Probe.__call__

    def interrupted(self: measure.Probe, *args: Any) -> None:
        ran.append(1)
        if len(ran) == 4:  # in the second sample
            raise KeyboardInterrupt
        probe(self, *args)

    monkeypatch.setattr(measure.Probe, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, state=state)
    assert state.exists()
    again = calibrated(model, state=state)
    assert untimed(again).to_toml() == untimed(whole).to_toml()
    assert len(ran) == 4 + 2 * 2  # the first sample was not measured again
    assert list(tmp_path.iterdir()) == [state]


def test_another_budget_needs_only_the_search(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrated(model, budget=0.1, metric="rmse")
    calibrated(model, state=tmp_path / "state.pt")
    for measured in (measure.Probe, influence.Tap):
        monkeypatch.setattr(measured, "__call__", None)
    again = calibrated(model, state=tmp_path / "state.pt", budget=0.1, metric="rmse")
    assert untimed(again).to_toml() == untimed(whole).to_toml()


def test_one_interrupted_while_it_verifies_does_not_measure_again(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrated(model)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OutputError, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrated(model, state=tmp_path / "state.pt")
    monkeypatch.setattr(measure.Probe, "__call__", stop)
    again = calibrated(model, state=tmp_path / "state.pt")
    assert untimed(again).to_toml() == untimed(whole).to_toml()


def test_what_a_candidate_asks_stays_in_the_rules(model: nn.Module) -> None:
    asked = [Rule("block_topk", provider="reference", min_seq=8, params=dict(rule.params)) for rule in LADDER]
    rules = calibrated(model, budget=0.3, candidates=asked).rules
    assert rules
    assert all((rule.provider, rule.min_seq, rule.kind) == ("reference", 8, "self") for rule in rules)


def test_a_candidate_that_gives_nan_is_not_chosen(model: nn.Module) -> None:
    sums = {number: Sums(squared=[1.0], dense_squared=[9.0], work=9.0 - number) for number in (DENSE, 0, 1)}
    sums[0].squared, ledger = [float("nan")], Ledger()
    for number, measured in sums.items():
        measured_at = ledger.at(Place("m", "self", 0), number)
        vars(measured_at).update(vars(measured))
    (choice,) = choose(ledger, expand(LADDER[:2]), 1e-3, "work").values()
    assert choice.candidates == (1,)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"candidates": [Rule("block_topk", steps=":2", params={"keep_ratio": 0.5})]}, "names steps"),
        ({"given": []}, "no samples. Give at least one tuple"),
        ({"given": [3]}, "a sample is a tuple of arguments"),
        ({"budget": 0}, "budget must be a positive number"),
        ({"budget": -0.1}, "budget must be a positive number"),
        ({"metric": "l3"}, "metric must be one of relative_l1, relative_l2, cosine"),
        ({"candidates": []}, "no candidates"),
        ({"candidates": [Rule("flash,block_topk")]}, "a rule with one backend"),
        ({"candidates": [Rule("block_topk", params={"keep_ratio": [0.1, 0.2]})]}, "differs by head or step already"),
        ({"candidates": [Rule("flash")]}, "how many scores .* is not known"),
        ({"candidates": [Rule("block_topk", head_dim=64, params={"keep_ratio": 0.5})]}, "no candidate can serve"),
        ({"total_steps": 3}, "for samples that name their step"),
        ({"given": [Sample((smooth(0),), step=0)]}, "total_steps says how many"),
        ({"given": [Sample((smooth(0),), step=9)], "total_steps": 3}, "step 9 is not in 0 ... 2"),
        ({"given": [Sample((smooth(0),), step=0)], "total_steps": 4, "buckets": 2}, "no sample has a step in 2 ... 3"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model: nn.Module, options: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        calibrated(model, **options)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(PolicyError, match="no candidate can serve an attention of this model"):
        calibrated(nn.Linear(4, 4), [(torch.randn(2, 4),)])


@pytest.mark.parametrize("content", [b"not a state", None])
def test_a_state_of_something_else_is_refused_and_left(model: nn.Module, tmp_path: Path, content: bytes | None) -> None:
    state = tmp_path / "state.pt"
    if content is None:
        calibrated(model, samples(1), state=state)
    else:
        state.write_bytes(content)
    before = state.read_bytes()
    with pytest.raises(
        PolicyError, match=r"state\.pt is (not the state|of another calibration: samples, values differ)"
    ):
        calibrated(model, state=state)
    assert state.read_bytes() == before


def test_a_state_of_other_values_is_refused(model: nn.Module, tmp_path: Path) -> None:
    calibrated(model, state=tmp_path / "state.pt")
    with pytest.raises(PolicyError, match="of another calibration: values differ"):
        calibrated(model, samples()[::-1], state=tmp_path / "state.pt")
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(PolicyError, match="of another calibration: values differ"):
        calibrated(model, state=tmp_path / "state.pt")


def test_a_policy_of_the_environment_does_not_stand_in_for_the_result(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEATTN_POLICY", "exact")
    policy = calibrated(model, budget=0.1)
    assert policy.measured is not None
    assert policy.measured.error is not None
    assert policy.measured.error > 0
    monkeypatch.setenv("SPARSEATTN_DISABLE", "1")
    with pytest.raises(PolicyError, match="SPARSEATTN_DISABLE is set"):
        calibrated(model)


def test_a_function_is_calibrated(model: nn.Module) -> None:
    def attend(q: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)

    given = [(smooth(0).unflatten(-1, (HEADS, DIM)).transpose(1, 2),)]
    policy = calibrated(attend, given, weigh="site", budget=0.5)
    assert [rule.modules for rule in policy.rules] == [("*",)]


def test_lengths_that_differ_under_one_layout(model: nn.Module) -> None:
    """A candidate that knows the grid serves the length that the grid has, and no other."""
    tiles = [Rule("sta", layout=[4, 8, 8], params={"window": [3, 3, 3], "tile": [2, 4, 4]}), *LADDER]
    given = [(smooth(0),), (smooth(1)[:, : SEQ // 2],)]
    assert calibrated(model, given, candidates=tiles, objective="time", budget=0.1).measured is not None


def test_nothing_is_left_behind(model: nn.Module) -> None:
    before = model(*samples(1)[0])
    calibrated(model, samples(1))
    assert torch.equal(model(*samples(1)[0]), before)
    assert torch.is_grad_enabled()
