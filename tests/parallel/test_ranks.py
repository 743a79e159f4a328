"""Processes on gloo: attention over shards is attention over the whole, in every method, model and number of ranks."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support.ranks import run

CLOSE = 1e-5
"""Largest difference of an entry to the model on one rank, fp32."""

MORE = {"cogvideox", "hunyuan_video", "ltx"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")


def _far(found: dict[str, list[Any]]) -> dict[str, Any]:
    """The cases with a rank whose numbers are not close."""
    return {case: ranks for case, ranks in found.items() if any(not _close(rank) for rank in ranks)}


def _close(rank: dict[str, float]) -> bool:
    return all(distance <= CLOSE for distance in rank.values())


def test_every_method_gives_what_it_gives_on_one_rank() -> None:
    found = run("support.sharded_cases", 3, "OPS")
    assert len(found) == 2
    assert all(len(of) == 3 for of in found.values())
    assert not _far(found)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_other_numbers_of_ranks(ranks: int) -> None:
    found = run("support.sharded_cases", ranks, "FEW")
    assert len(found["a few"]) == ranks
    assert not _far(found)


@pytest.mark.models
@pytest.mark.parametrize(("cases", "names"), [("MODELS", {"llama", "wan"}), ("MORE_MODELS", MORE)])
def test_unmodified_models_give_what_they_give_on_one_rank(
    cases: str, names: set[str], pytestconfig: pytest.Config
) -> None:
    if cases == "MORE_MODELS" and not pytestconfig.getoption("--all-sharded-models"):
        pytest.skip("a minute of two cores: pass --all-sharded-models")
    found = run("support.sharded_cases", 3, cases)
    assert set(found) == names
    assert all(len(of) == 3 for of in found.values())
    assert not _far(found)


def test_rings_give_what_one_rank_gives() -> None:
    found = run("support.sharded_rings", 3, "RINGS")
    assert all(len(of) == 3 for of in found.values())
    assert not _far(found)


@pytest.fixture(scope="module")
def two() -> dict[str, list[Any]]:
    """The other cases, on two ranks."""
    return run("support.sharded_runs", 2, "RUNS")


@pytest.mark.parametrize("case", ["causal", "inductor", "regions", "ring_inductor"])
def test_shards_in_other_circumstances(two: dict[str, list[Any]], case: str) -> None:
    assert len(two[case]) == 2
    assert not _far({case: two[case]})


def test_a_model_that_is_given_shards(two: dict[str, list[Any]]) -> None:
    assert max(two["given_shards"]) <= CLOSE


def test_one_graph_for_five_steps_with_two_collectives_a_site(two: dict[str, list[Any]]) -> None:
    forward_and_backward = 2
    assert two["steps"] == [{"graphs": forward_and_backward, "forward": 2 * 2, "backward": 2 * 2}] * 2


def test_the_report_has_the_bytes_that_are_sent(two: dict[str, list[Any]]) -> None:
    for rank in two["counted"]:
        assert rank["reported"] == rank["sent"] > 0
        assert rank["collectives"] == rank["calls"] == 2 * 2


def test_a_ring_passes_on_as_often_as_there_are_other_ranks(two: dict[str, list[Any]]) -> None:
    for rank in two["ring_counted"]:
        assert rank["reported"] == rank["sent"] > 0
        assert rank["collectives"] == rank["calls"] == 2 * 1


def test_other_shapes_are_told_to_all_ranks(two: dict[str, list[Any]]) -> None:
    for error, other in zip(two["other_shapes"], (1, 0), strict=True):
        assert "ParallelError: parallel: every rank must exchange the same" in error
        assert f"where rank {other} has" in error


def test_fewer_heads_than_ranks_are_told_to_all(two: dict[str, list[Any]]) -> None:
    for error in two["too_many_ranks"]:
        assert "must be at most the query heads, got 2 ranks and 1 heads" in error


@pytest.mark.parametrize("case", ["LOST", "LATE"])
def test_no_rank_waits_for_ever(case: str) -> None:
    """The time-out of the group is 6 seconds; the rank that is missed says nothing, the other says what it missed."""
    (errors,) = run("support.sharded_runs", 2, case).values()
    seconds, kind, *_ = errors[0].split(": ")
    assert int(seconds.removesuffix(" s")) <= 12
    assert kind in ("RuntimeError", "DistBackendError")
