"""prove_mask: what it proves, what it must not claim, and that it never touches the graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.graphs import capture, exported, fresh_dynamo, listing  # noqa: F401
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from sparseattn.fx_passes.normalize import MaskFact, prove_mask

CAUSAL, NONE = MaskFact(causal=True), MaskFact(causal=False)
Masked = Callable[[Tensor, Tensor], Tensor]


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=k.device)[None, :]


def window(q: Tensor, k: Tensor, size: int) -> Tensor:
    row, column = places(q, k)
    return (column <= row) & (column > row - size)


def square(q: Tensor, fill: float) -> Tensor:
    return torch.full((q.shape[2], q.shape[2]), fill, device=q.device)


PROVED: dict[str, tuple[Masked, MaskFact]] = {
    "tril": (lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), CAUSAL),
    "compared_places": (lambda q, k: places(q, k)[1] <= places(q, k)[0], CAUSAL),
    "batched": (lambda q, k: (places(q, k)[1] <= places(q, k)[0]).expand(q.shape[0], 1, -1, -1), CAUSAL),
    "every_head": (lambda q, k: (places(q, k)[1] <= places(q, k)[0]).expand(1, q.shape[1], -1, -1), CAUSAL),
    "float_infinity": (lambda q, k: square(q, -math.inf).triu(1), CAUSAL),
    "float_lowest": (lambda q, k: square(q, torch.finfo(torch.float32).min).triu(1)[None, None], CAUSAL),
    "filled": (lambda q, k: square(q, 0.0).masked_fill(square(q, 1.0).triu(1).bool(), -math.inf), CAUSAL),
    "filled_in_place": (lambda q, k: square(q, 0.0).masked_fill_(~square(q, 1.0).tril().bool(), -math.inf), CAUSAL),
    "window": (lambda q, k: window(q, k, 5), MaskFact(causal=True, window=5)),
    "window_of_one": (lambda q, k: window(q, k, 1), MaskFact(causal=True, window=1)),
    "all_visible": (lambda q, k: torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool), NONE),
    "all_visible_row": (lambda q, k: torch.ones(q.shape[0], 1, 1, k.shape[2], dtype=torch.bool), NONE),
    "zeros": (lambda q, k: square(q, 0.0), NONE),
}
NOT_PROVED: dict[str, Masked] = {
    "bottom_right": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1),
    "anti_causal": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(),
    "symmetric_window": lambda q, k: (places(q, k)[0] - places(q, k)[1]).abs() < 3,
    "one_hole": lambda q, k: window(q, k, 10**6) & ~((places(q, k)[0] == 7) & (places(q, k)[1] == 3)),
    "one_head_differs": lambda q, k: window(q, k, 99) & (places(q, k)[1] >= torch.arange(4).view(4, 1, 1) - 2),
    "data": lambda q, k: (k[:, :1, None, :, 0] > -1e9).expand(-1, 1, q.shape[2], -1),
    "small_penalty": lambda q, k: square(q, -100.0).triu(1),
    "lowest_in_a_whole_row": lambda q, k: square(q, torch.finfo(torch.float32).min).triu(0),
    "alibi": lambda q, k: (places(q, k)[1] - places(q, k)[0]).float(),
    "random": lambda q, k: torch.rand(q.shape[2], k.shape[2]) > -1,
}


def tensors(seq: int = 24, keys: int | None = None) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, seq, 8), torch.randn(2, 4, keys or seq, 8)


def attention(mask: Masked) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda q, k: scaled_dot_product_attention(q, k, k, attn_mask=mask(q, k))


def mask_of(graph: fx.GraphModule) -> fx.Node:
    sdpa = next(node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
    mask = sdpa.kwargs["attn_mask"] if "attn_mask" in sdpa.kwargs else sdpa.args[3]
    assert isinstance(mask, fx.Node)
    return mask


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", PROVED)
def test_proves(form: str, dynamic: bool) -> None:
    mask, fact = PROVED[form]
    graph = capture(attention(mask), *tensors(), dynamic=dynamic)
    before = listing(graph)
    assert prove_mask(mask_of(graph), 24, 24) == fact
    assert listing(graph) == before


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", NOT_PROVED)
def test_does_not_claim(form: str, dynamic: bool) -> None:
    graph = capture(attention(NOT_PROVED[form]), *tensors(), dynamic=dynamic)
    assert prove_mask(mask_of(graph), 24, 24) is None


@pytest.mark.parametrize(("queries", "keys"), [(16, 24), (24, 16)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_proves_top_left_with_other_lengths(queries: int, keys: int, dynamic: bool) -> None:
    for form in ("compared_places", "window", "all_visible"):
        torch._dynamo.reset()
        mask, fact = PROVED[form]
        graph = capture(attention(mask), *tensors(queries, keys), dynamic=dynamic)
        assert prove_mask(mask_of(graph), queries, keys) == fact


def test_does_not_claim_bottom_right_with_other_lengths() -> None:
    def last_rows(q: Tensor, k: Tensor) -> Tensor:
        row, column = places(q, k)
        return column <= row + (k.shape[2] - q.shape[2])

    graph = capture(attention(last_rows), *tensors(16, 24), dynamic=True)
    assert prove_mask(mask_of(graph), 16, 24) is None


@pytest.mark.parametrize("size", [100, 500, 3000])
def test_sees_a_window_longer_than_the_traced_length(size: int) -> None:
    q, k = tensors()
    for tensor in (q, k):
        torch._dynamo.mark_dynamic(tensor, 2)
    graph = capture(attention(lambda q, k: window(q, k, size)), q, k)
    assert prove_mask(mask_of(graph), 24, 24) == MaskFact(causal=True, window=size)


def test_a_window_no_static_length_reaches_is_causal() -> None:
    graph = capture(attention(lambda q, k: window(q, k, 100)), *tensors(), dynamic=False)
    assert prove_mask(mask_of(graph), 24, 24) == CAUSAL


def test_does_not_claim_what_is_too_large_to_compare() -> None:
    dynamic = capture(attention(lambda q, k: window(q, k, 100_000)), *tensors(), dynamic=True)
    assert prove_mask(mask_of(dynamic), 24, 24) is None
    torch._dynamo.reset()
    meta = [tensor.to("meta") for tensor in (torch.empty(1, 1, 8200, 1), torch.empty(1, 1, 8200, 1))]
    static = capture(lambda q, k: window(q, k, 3), *meta, dynamic=False)
    mask = next(node for node in static.graph.nodes if node.op == "output").args[0][0]
    assert prove_mask(mask, 8200, 8200) is None


def test_does_not_claim_a_buffer() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.ones(64, 64, dtype=torch.bool).tril())

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, k, attn_mask=self.bias[: q.shape[2], : k.shape[2]])

    assert prove_mask(mask_of(capture(Buffered(), *tensors())), 24, 24) is None
    assert prove_mask(mask_of(exported(Buffered(), *tensors()).graph_module), 24, 24) is None


def test_does_not_claim_a_mask_that_is_written_to() -> None:
    def written(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.ones(24, 24, dtype=torch.bool).tril()
        mask[3, 2] = False
        return mask

    def row_written(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.ones(24, 24, dtype=torch.bool).tril()
        mask[5].logical_not_()
        return mask

    def written_as_result(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.ones(24, 24, dtype=torch.bool).tril()
        torch.logical_not(mask, out=mask)
        return mask

    for mask in (written, row_written, written_as_result):
        torch._dynamo.reset()
        assert prove_mask(mask_of(capture(attention(mask), *tensors(), dynamic=False)), 24, 24) is None


def test_does_not_claim_for_other_lengths_than_the_mask_has() -> None:
    graph = capture(attention(PROVED["tril"][0]), *tensors(), dynamic=False)
    assert prove_mask(mask_of(graph), 24, 25) is None


def test_hidden_masks_are_read_the_other_way() -> None:
    graph = capture(lambda q, k: q @ k.mT.masked_fill(torch.ones(8, 24).triu(1).bool(), 0), *tensors(), dynamic=False)
    hides = next(node for node in graph.graph.nodes if node.target == "bool")
    assert prove_mask(hides, 8, 24) is None
    assert prove_mask(hides, 8, 24, hidden=True) == CAUSAL


def test_proves_exported_programs() -> None:
    class Causal(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return attention(PROVED["batched"][0])(q, k)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = exported(Causal(), *tensors(), dynamic_shapes=[{2: tokens}] * 2)
    assert prove_mask(mask_of(program.graph_module), 24, 24) == CAUSAL


def test_adds_no_guard() -> None:
    graphs: list[MaskFact | None] = []

    def backend(graph: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(prove_mask(mask_of(graph), 24, 24))
        return graph.forward

    run = torch.compile(attention(PROVED["window"][0]), backend=backend, dynamic=True)
    for seq in (24, 16, 200):
        run(*tensors(seq))
    assert graphs == [MaskFact(causal=True, window=5)]


@pytest.mark.models
@pytest.mark.parametrize(
    ("implementation", "sliding", "fact"), [("sdpa", 8, MaskFact(causal=True, window=8)), ("eager", None, CAUSAL)]
)
def test_proves_the_masks_of_mistral(implementation: str, sliding: int | None, fact: MaskFact) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from sparseattn.fx_passes.normalize import fuse_unfused

    config = MistralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=sliding,
    )  # fmt: skip
    model = MistralForCausalLM._from_config(config, attn_implementation=implementation).eval()
    ids = torch.randint(1, 90, (2, 16))
    for dynamic in (False, True):
        torch._dynamo.reset()
        graph = capture(lambda tokens: model(tokens, use_cache=False).logits, ids, dynamic=dynamic)
        fuse_unfused(graph)
        assert prove_mask(mask_of(graph), 16, 16) == fact
    torch._dynamo.reset()
    padded = capture(lambda tokens, keep: model(tokens, keep, use_cache=False).logits, ids, torch.ones_like(ids))
    fuse_unfused(padded)
    assert prove_mask(mask_of(padded), 16, 16) is None
