"""Heads shared by ranks: everyone has as many, every query head is computed with its own key and value head."""

from __future__ import annotations

import itertools

import pytest

from sparseattn.attn_ops.errors import ParallelError
from sparseattn.lowering.head_split import HeadSplit

SIZES = [
    (group * kv, kv, ranks)
    for group, kv, ranks in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 8), (1, 2, 3, 4, 8))
]
SPLIT = [sizes for sizes in SIZES if sizes[0] >= sizes[2]]


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), SPLIT)
def test_every_head_is_computed_with_its_own_keys(heads: int, kv_heads: int, ranks: int) -> None:
    split = HeadSplit.of(heads, kv_heads, ranks)
    queries = [*range(heads)] + [heads - 1] * split.padding
    keys = [head for head in range(kv_heads) for _ in range(split.repeat)]
    keys += [keys[-1]] * (split.own_kv * ranks - len(keys))
    assert len(queries) == split.own * ranks
    assert len(keys) == split.own_kv * ranks
    assert split.own % split.own_kv == 0
    for place, head in enumerate(queries[:heads]):
        rank, own = divmod(place, split.own)
        key = keys[rank * split.own_kv + own // (split.own // split.own_kv)]
        assert key == head // (heads // kv_heads)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), SPLIT)
def test_no_rank_computes_more_than_it_must(heads: int, kv_heads: int, ranks: int) -> None:
    assert HeadSplit.of(heads, kv_heads, ranks).own == -(-heads // ranks)


def test_key_heads_are_sent_once_where_they_can_be() -> None:
    assert HeadSplit.of(8, 4, 2).repeat == 1
    assert HeadSplit.of(8, 2, 4).repeat == 2
    assert HeadSplit.of(40, 40, 8).padding == 0


def test_a_rank_gets_its_values_of_a_list() -> None:
    split = HeadSplit.of(5, 5, 2)
    assert split.of_rank(0, (1.0, 2.0, 3.0, 4.0, 5.0)) == (1.0, 2.0, 3.0)
    assert split.of_rank(1, (1.0, 2.0, 3.0, 4.0, 5.0)) == (4.0, 5.0, 5.0)
    assert split.of_rank(1, tuple(range(10))) == (6, 7, 8, 9, 8, 9)


def test_fewer_heads_than_ranks_are_refused() -> None:
    with pytest.raises(ParallelError, match="got 4 ranks and 2 heads: 2 would have nothing to compute"):
        HeadSplit.of(2, 2, 4)


def test_it_says_what_it_does() -> None:
    assert (
        str(HeadSplit.of(6, 2, 4))
        == "6 heads on 4 ranks, 2 on each, key and value heads repeated 3 times, 2 of padding"
    )
