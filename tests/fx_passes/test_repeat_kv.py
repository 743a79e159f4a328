"""peel_repeat_kv: which repetitions of heads it looks through, and which it must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.graphs import capture, exported, fresh_dynamo  # noqa: F401
from torch import Tensor, fx, nn

from sparseattn.fx_passes.normalize import peel_repeat_kv

B, KV, N, S, D = 2, 2, 3, 8, 4
H = KV * N

REPEATED: dict[str, Callable[[Tensor], Tensor]] = {
    "transformers": lambda k: k[:, :, None, :, :].expand(B, KV, N, k.shape[2], D).reshape(B, H, k.shape[2], D),
    "short_index": lambda k: k[:, :, None].expand(-1, -1, N, -1, -1).reshape(B, H, -1, D),
    "unsqueezed": lambda k: k.unsqueeze(2).expand(-1, -1, N, -1, -1).contiguous().view(B, H, -1, D),
    "flattened": lambda k: k.unsqueeze(-3).expand(-1, -1, N, -1, -1).flatten(1, 2),
    "repeated_new_axis": lambda k: k[:, :, None].repeat(1, 1, N, 1, 1).flatten(1, 2),
    "interleaved": lambda k: k.repeat_interleave(N, dim=1),
    "interleaved_function": lambda k: torch.repeat_interleave(k, N, -3),
    "copied_after": lambda k: k.repeat_interleave(N, 1).to(k.dtype).contiguous(),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "tiled": lambda k: k.repeat(1, N, 1, 1),
    "tiled_by_new_axis_before": lambda k: k[:, None].expand(-1, N, -1, -1, -1).reshape(B, H, -1, D),
    "scaled": lambda k: (k * 2).repeat_interleave(N, 1) + 1,
    "cast": lambda k: k.repeat_interleave(N, 1).double(),
    "per_head_counts": lambda k: k.repeat_interleave(torch.tensor([1, 5]), dim=1, output_size=H),
    "flipped_index": lambda k: k[:, [1, 0]][:, :, None].expand(-1, -1, N, -1, -1).reshape(H, B, -1, D).transpose(0, 1),
}


def last(graph: fx.GraphModule) -> fx.Node:
    output = next(node for node in graph.graph.nodes if node.op == "output")
    result: fx.Node = output.args[0][0]
    return result


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", REPEATED)
def test_peels(form: str, dynamic: bool) -> None:
    k = torch.randn(B, KV, S, D)
    if dynamic:
        torch._dynamo.mark_dynamic(k, 2)
    node, groups = peel_repeat_kv(last(capture(REPEATED[form], k)), H)
    assert (node.op, groups) == ("placeholder", N)
    torch.testing.assert_close(k.repeat_interleave(groups, 1), REPEATED[form](k), rtol=0, atol=0)


@pytest.mark.parametrize("form", REPEATED)
def test_peels_exported_programs(form: str) -> None:
    class Repeat(nn.Module):
        def forward(self, k: Tensor) -> Tensor:
            return REPEATED[form](k)

    program = exported(Repeat(), torch.randn(B, KV, S, D), dynamic_shapes=[{2: torch.export.Dim("tokens", min=2)}])
    node, groups = peel_repeat_kv(last(program.graph_module), H)
    assert (node.op, groups) == ("placeholder", N)


def test_peels_one_head_for_all() -> None:
    node, groups = peel_repeat_kv(last(capture(lambda k: k.expand(-1, H, -1, -1), torch.randn(B, 1, S, D))), H)
    assert (node.op, groups) == ("placeholder", H)


@pytest.mark.parametrize("form", OTHER)
def test_leaves_alone(form: str) -> None:
    repeated = last(capture(OTHER[form], torch.randn(B, KV, S, D)))
    node, groups = peel_repeat_kv(repeated, H)
    assert groups == 1 or node.op != "placeholder"
    assert groups != 1 or node is repeated


def test_leaves_a_key_that_is_not_repeated() -> None:
    key = last(capture(lambda k: k * 2, torch.randn(B, H, S, D)))
    assert peel_repeat_kv(key, H) == (key, 1)
