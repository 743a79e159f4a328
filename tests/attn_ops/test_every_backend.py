"""What no backend may do, whatever it computes: the faults that published implementations have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.graphs import capture
from torch import Tensor
from torch.nn import functional

import sparseattn
from sparseattn import Capability, Policy, Rule
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.fx_passes.rewrite import rewrite_graph
from sparseattn.lowering.decide import decide

SEQ, DIM = 64, 16
GRID, SMALL = (4, 4, 4), {"block_q": 16, "block_k": 16}
CAUSAL = ("flash", "sage", "sage_fp4", "block_topk", "sparge")
PARAMS: dict[str, dict[str, Any]] = {
    "flash": {},
    "sage": {},
    "sage_fp4": {},
    "block_topk": {**SMALL, "keep_ratio": 0.5},
    "sparge": {**SMALL, "keep_ratio": 0.5},
    "sla": {**SMALL, "keep_ratio": 0.5},
    "sage_sla": {**SMALL, "keep_ratio": 0.5},
    "vsa": {"tile": (2, 2, 2), "sparsity": 0.5},
    "sta": {"tile": (2, 2, 2), "window": (1, 1, 2)},
    "vmoba": {"chunk": (1, 0, 0), "topk": 2},
}
SELECTABLE = sorted(name for name, spec in sparseattn.backends().items() if spec.selectable)
EVERY = pytest.mark.parametrize("name", SELECTABLE)


def op_of(name: str) -> torch._ops.OpOverload:
    op: torch._ops.OpOverload = getattr(torch.ops.sparseattn, sparseattn.backends()[name].op).default
    return op


def takes(name: str, argument: str) -> bool:
    return argument in [given.name for given in op_of(name)._schema.arguments]


def arguments(name: str) -> dict[str, Any]:
    return PARAMS[name] | ({"grid": GRID} if takes(name, "grid") else {})


def policy_of(name: str) -> Policy:
    provider = "reference" if name == "sage_fp4" else None
    layout = GRID if takes(name, "grid") else None
    return Policy([Rule(name, layout=layout, params=PARAMS[name], provider=provider)])


def inputs(batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, heads, SEQ, DIM) for heads in (4, 2, 2)]


@EVERY
def test_items_of_a_batch_do_not_meet(name: str) -> None:
    """Published means, scales and selections mix what is packed into one call; here the second item is far off."""
    q, k, v = inputs(batch=2)
    k[1] += 30
    v[1] *= 100
    out, lse = op_of(name)(q, k, v, **arguments(name))
    for item in range(2):
        alone = op_of(name)(*(x[item : item + 1] for x in (q, k, v)), **arguments(name))
        torch.testing.assert_close((out[item : item + 1], lse[item : item + 1]), alone, rtol=1e-5, atol=1e-5)


@EVERY
def test_a_result_survives_the_next_call(name: str) -> None:
    """A published buffer of tiles is valid until the next call."""
    first = op_of(name)(*inputs(), **arguments(name))
    before = [x.clone() for x in first]
    second = op_of(name)(*inputs(), **arguments(name))
    assert all(torch.equal(x, y) for x, y in zip(first, before, strict=True))
    assert not torch.equal(second[0], first[0])


@EVERY
def test_scale_is_a_factor_of_the_scores(name: str) -> None:
    """Exactly, being a power of two: in the choice of blocks, in the rounding and in the softmax."""
    q, k, v = inputs()
    scaled = op_of(name)(q, k, v, **arguments(name), scale=0.5 * DIM**-0.5)
    torch.testing.assert_close(scaled, op_of(name)(0.5 * q, k, v, **arguments(name)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scaled[0], op_of(name)(q, k, v, **arguments(name))[0], atol=1e-3)


@EVERY
def test_arguments_it_does_not_have_are_refused(name: str) -> None:
    """Published functions take any keyword and drop it, and a mask in SDPA's fourth place is a tensor layout there."""
    q, k, v = inputs()
    mask = torch.ones(SEQ, SEQ, dtype=torch.bool)
    for unknown in ({"attn_mask": mask}, {"dropout_p": 0.5}, {"enable_gqa": True}, {"output_dtype": torch.float16}):
        with pytest.raises(RuntimeError, match=f"Unknown keyword argument '{next(iter(unknown))}'"):
            op_of(name)(q, k, v, **arguments(name), **unknown)
    for fourth in (mask, mask.float()):
        with pytest.raises((RuntimeError, ValueError), match=r"positional argument|weight must|gate must"):
            op_of(name)(q, k, v, fourth, **arguments(name))


@EVERY
@pytest.mark.parametrize(
    ("change", "served_by", "reason"),
    [
        ({"mask": "bool"}, (), "a bool mask is given"),
        ({"mask": "float"}, (), "a float mask is given"),
        ({"dropout": 0.1}, (), "dropout 0.1"),
        ({"value_dim": 32}, (), "value head_dim 32"),
        ({"causal": True}, CAUSAL, "causal attention is not supported"),
        ({"causal": True, "window": 8}, ("flash",), "sliding window of 8"),
        ({"heads": 5}, (), "5 query heads are not a multiple of 2"),
    ],
)
def test_what_it_cannot_be_told_keeps_a_site_dense(
    name: str, change: dict[str, Any], served_by: tuple[str, ...], reason: str
) -> None:
    given = {"heads": 4, "kv_heads": 2, "seq_q": SEQ, "seq_k": SEQ, "head_dim": DIM}
    decision = decide(AttentionCall(1, **{**given, **change}), Capability.of("cpu"), policy_of(name))
    assert decision.backend == (name if name in served_by else None)
    assert decision.backend == name or reason in str(dict(decision.rejected)[name])


@EVERY
@pytest.mark.parametrize("causal", [False, True])
def test_scale_causal_and_grouped_heads_reach_the_op(name: str, causal: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, None, 0.0, causal, scale=0.3, enable_gqa=True)

    given = inputs()
    with torch.no_grad():
        graph = capture(attend, *given)
        report = rewrite_graph(graph, policy_of(name))
    if causal and name not in CAUSAL:
        assert report.rewritten == 0
        torch.testing.assert_close(graph(*given)[0], attend(*given), rtol=0, atol=0)
        return
    (node,) = graph.graph.find_nodes(op="call_function", target=op_of(name))
    assert [operand.meta["example_value"].shape[1] for operand in node.args[:3]] == [4, 2, 2]
    assert node.kwargs["scale"] == 0.3
    told = {"scale": 0.3} | ({"causal": True} if causal else {})
    torch.testing.assert_close(graph(*given)[0], op_of(name)(*given, **arguments(name), **told)[0])


@EVERY
def test_every_gpu_from_sm80_on_is_served(name: str) -> None:
    """Published dispatchers compare names of architectures, and raise on sm87, sm100, sm103 and sm110."""
    layout = sparseattn.VideoLayout(GRID) if takes(name, "grid") else None
    for sm in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121):
        call = AttentionCall(1, 4, 4, SEQ, SEQ, 64, torch.float16, "cuda", layout=layout)
        assert decide(call, Capability.of(f"sm{sm}"), policy_of(name)).backend == name
