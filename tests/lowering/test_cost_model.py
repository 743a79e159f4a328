"""The cost model: predictions that keep to the published proportions, and refusals."""

from __future__ import annotations

import pytest

from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.lowering.cost_model import predicted_seconds

CALL = AttentionCall(1, 24, 24, 32768, 32768, 128)
SM90 = Capability.of("sm90")


def test_dense_attention_runs_at_the_published_throughput() -> None:
    flops = 4 * 24 * 32768**2 * 128
    assert predicted_seconds(CALL, None, 1.0, SM90) == pytest.approx(flops / 339e12, rel=1e-3)


def test_sparse_attention_takes_its_share_and_a_little_more() -> None:
    dense, sparse = predicted_seconds(CALL, None, 1.0, SM90), predicted_seconds(CALL, "block_topk", 0.1, SM90)
    assert 0.1 / 0.9 < sparse / dense < 0.12


def test_int8_is_faster_and_a_small_site_is_not() -> None:
    assert predicted_seconds(CALL, "sage", 1.0, SM90) < 0.5 * predicted_seconds(CALL, None, 1.0, SM90)
    small = AttentionCall(1, 4, 4, 128, 128, 64)
    assert predicted_seconds(small, "sparge", 0.2, SM90) > predicted_seconds(small, None, 1.0, SM90)


@pytest.mark.parametrize(("machine", "backend"), [("sm100", "block_topk"), ("cpu-avx512", None), ("sm120", "sage_fp4")])
def test_what_nobody_published_is_not_predicted(machine: str, backend: str | None) -> None:
    with pytest.raises(PolicyError, match="predicted"):
        predicted_seconds(CALL, backend, 0.5, Capability.of(machine))
