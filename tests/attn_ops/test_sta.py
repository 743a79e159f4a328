"""sliding_tile_attention: the windows, the attention to them, and the contract of the op."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, tokens
from support.graphs import fresh_dynamo  # noqa: F401  (a fixture)
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

import sparseattn
from sparseattn import Policy, Rule, Schedule, VideoLayout
from sparseattn.attn_ops.backends import sta as backend
from sparseattn.attn_ops.blocks.sliding_tiles import window_density, window_index, window_mask
from sparseattn.attn_ops.blocks.tiles import Tiling
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import ArgumentError, PolicyError, RequirementError
from sparseattn.attn_ops.op import same_defaults
from sparseattn.attn_ops.reference import sta as reference

OP = torch.ops.sparseattn.sliding_tile_attention
CANVASES = {115200: (30, 48, 80), 82944: (36, 48, 48), 69120: (18, 48, 80)}
# heads, kv heads, then the op's arguments
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "whole tiles": (2, 2, {"grid": (6, 6, 8), "tile": (2, 2, 2), "window": (1, 3, 3)}),
    "short tiles": (2, 2, {"grid": (5, 6, 7), "tile": (2, 3, 3), "window": (1, 1, 3)}),
    "even window": (2, 2, {"grid": (5, 4, 10), "tile": (1, 2, 2), "window": (2, 1, 2)}),
    "an image": (2, 2, {"grid": (1, 12, 10), "tile": (6, 4, 4), "window": (3, 1, 1)}),
    "window per head": (2, 1, {"grid": (4, 6, 6), "tile": (2, 2, 2), "window": (1, 3, 1, 2, 1, 3)}),
    "text after": (2, 2, {"grid": (4, 4, 6), "tile": (2, 2, 2), "window": (1, 1, 3), "text_tokens": 11}),
    "text before": (
        *(4, 2),
        {"grid": (5, 4, 6), "tile": (2, 2, 2), "window": (1, 1, 3), "text_tokens": 13, "text_first": True},
    ),
    "padded prompt": (
        *(2, 2),
        {"grid": (4, 4, 6), "tile": (2, 2, 2), "window": (1, 1, 3), "text_tokens": 20, "text_length": 5},
    ),
    "no prompt": (
        *(2, 2),
        {"grid": (4, 4, 6), "tile": (2, 2, 2), "window": (1, 1, 3), "text_tokens": 6, "text_length": 0},
    ),
    "tile order": (
        *(2, 2),
        {"grid": (3, 4, 5), "tile": (2, 2, 2), "window": (1, 3, 1), "text_tokens": 9, "tiled": True},
    ),
}


def tiling_of(name: str) -> Tiling:
    arguments = CASES[name][2]
    layout = VideoLayout(arguments["grid"], arguments.get("text_tokens", 0), arguments.get("text_first", False))
    return Tiling(layout, arguments["tile"])


def inputs(
    name: str, dtype: torch.dtype = torch.float32, strided: bool = False, dim: int = 16, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, arguments = CASES[name]
    tiling = tiling_of(name)
    length = tiling.padded_tokens if arguments.get("tiled") else tiling.layout.tokens
    if strided:
        q, k, v = (torch.randn(batch, length, h, dim).to(dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    else:
        q, k, v = (torch.randn(batch, h, length, dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    return q, k, v


def definition(name: str) -> dict[str, Any]:
    """The arguments of the reference."""
    given = CASES[name][2]
    more = {"text_length": given.get("text_length"), "tiled": given.get("tiled", False)}
    return {"tiling": tiling_of(name), "window": given["window"], **more}


def clamped(tiles: int, window: int) -> Tensor:
    """Upstream's formulation of a window."""
    reach, number = window // 2, torch.arange(tiles)
    middle = torch.clamp(number, reach, tiles - 1 - reach)
    return (middle[:, None] - number[None, :]).abs() <= reach


def neighbourhood(tiles: int, window: int, size: int) -> Tensor:
    """NATTEN's strided neighbourhood, token by token: stride `size`, window `window * size`."""
    length, width = tiles * size, window * size
    token = torch.arange(length)
    leader = (token // size * size + size // 2).clamp(max=length - 1)
    left, right = width // 2, width // 2 + width % 2 - 1
    middle = leader.clamp(left, length - 1 - right)[:, None]
    return (token >= middle - left) & (token <= middle + right)


def dense_mask(name: str) -> Tensor:
    """(heads or 1, S, S) bool in raster order, from the coordinates of two tokens at a time."""
    arguments, layout = CASES[name][2], tiling_of(name).layout
    valid = arguments.get("text_length", layout.text_tokens)
    video = list(itertools.product(*map(range, layout.grid)))
    text: list[Any] = list(range(layout.text_tokens))
    order = [*text, *video] if layout.text_first else [*video, *text]
    window = arguments["window"]
    masks = []
    for head in range(len(window) // 3):
        ranges = []
        for tokens_, size, width in zip(layout.grid, arguments["tile"], window[3 * head :], strict=False):
            tiles = -(-tokens_ // size)
            wide = min(2 * (width // 2) + 1, tiles)
            first = [max(0, min(tile - width // 2, tiles - wide)) for tile in range(tiles)]
            ranges.append([range(low, low + wide) for low in first])

        def sees(query: Any, key: Any, ranges: Any = ranges) -> bool:
            if isinstance(key, int):
                return key < valid
            if isinstance(query, int):
                return True
            size = arguments["tile"]
            return all(key[a] // size[a] in ranges[a][query[a] // size[a]] for a in range(3))

        masks.append([[sees(query, key) for key in order] for query in order])
    return torch.tensor(masks)


def test_windows_are_upstreams() -> None:
    for tiles, window in itertools.product(range(1, 13), range(1, 16)):
        assert torch.equal(window_mask(tiles, window), clamped(tiles, window)), (tiles, window)


@pytest.mark.parametrize("size", [6, 8])
def test_odd_and_full_windows_are_nattens(size: int) -> None:
    for tiles in range(1, 11):
        for window in {*range(1, tiles + 1, 2), tiles}:
            wanted = window_mask(tiles, window).repeat_interleave(size, 0).repeat_interleave(size, 1)
            assert torch.equal(wanted, neighbourhood(tiles, window, size)), (tiles, window)


def test_every_tile_sees_equally_many_and_an_even_window_one_more() -> None:
    for tiles, window in itertools.product(range(1, 13), range(1, 16)):
        width = min(window if window % 2 else window + 1, tiles)
        assert (window_mask(tiles, window).sum(dim=1) == width).all()


@pytest.mark.parametrize("length", CANVASES)
def test_upstreams_canvases_in_upstreams_order(length: int) -> None:
    tiling = Tiling(VideoLayout(CANVASES[length]), (6, 8, 8))
    _, tiles_h, tiles_w = tiling.grid
    t, h, w = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, CANVASES[length]), indexing="ij"))
    place = ((t // 6 * tiles_h + h // 8) * tiles_w + w // 8) * 384 + (t % 6 * 8 + h % 8) * 8 + w % 8
    x = torch.arange(length).view(1, 1, length, 1)
    assert tiling.is_full
    assert torch.equal(tiling.to_tiles(x)[0, 0, place, 0], x.flatten())
    assert torch.equal(tiling.from_tiles(tiling.to_tiles(x)), x)


@pytest.mark.parametrize(
    ("grid", "window", "density"),
    [((30, 48, 80), (3, 3, 3), 0.09), ((30, 48, 80), (5, 5, 5), 0.41667), ((18, 48, 80), (3, 1, 10), 1 / 6)],
)
def test_published_densities(grid: tuple[int, int, int], window: tuple[int, int, int], density: float) -> None:
    lists = window_index(VideoLayout(grid), (6, 8, 8), window)
    assert lists.density == pytest.approx(density, abs=1e-4)
    assert window_density(Tiling(VideoLayout(grid), (6, 8, 8)), window) == pytest.approx(density, abs=1e-4)
    assert str(lists).startswith(f"BlockIndex: {lists.seq_q} x {lists.seq_k} tokens in ")


@pytest.mark.parametrize("name", CASES)
def test_the_mask_from_pairs_of_tokens(name: str) -> None:
    wanted, tiling = dense_mask(name), tiling_of(name)
    given = definition(name) | {"tiled": False, "device": torch.device("cpu")}
    assert torch.equal(reference.allowed_tokens(**given).expand_as(wanted), wanted)
    lists = window_index(tiling.layout, tiling.tile, given["window"], text_length=given["text_length"])
    place = tiling.places(torch.device("cpu"))
    in_tiles = lists.token_mask()[0][:, place][:, :, place]
    assert torch.equal(in_tiles.expand_as(wanted), wanted)


def check(name: str, given: tuple[Tensor, Tensor, Tensor], tolerance: float) -> None:
    leaves = [x.detach().requires_grad_() for x in given]
    out, lse = OP(*leaves, **CASES[name][2], scale=0.3)
    exact, exact_lse = reference.sliding_tile_attention(*(x.double() for x in given), **definition(name), scale=0.3)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    exact_grads = reference.sliding_tile_attention_backward(
        *(x.double() for x in (grad_out, grad_lse, exact, exact_lse, *given)), **definition(name), scale=0.3
    )
    assert out.stride() == torch.empty_like(given[0]).stride()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for value, wanted in zip((out.detach(), *grads), (exact, *exact_grads), strict=True):
        assert value.dtype is given[0].dtype
        assert float((value.double() - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strided", [False, True])
def test_forward_and_backward(name: str, dtype: torch.dtype, strided: bool) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    check(name, inputs(name, dtype, strided), tolerance)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_head_dims(dim: int) -> None:
    check("text before", inputs("text before", dim=dim), 1e-5)


@pytest.mark.parametrize("provider", ["cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_windows_in_a_tensor(name: str, provider: str) -> None:
    arguments = {**CASES[name][2], "provider": provider}
    windows = torch.tensor(arguments["window"], dtype=torch.float32)
    given = [x.requires_grad_() for x in inputs(name)]
    fixed, brought = OP(*given, **arguments), OP(*given, **arguments | {"window": [9, 9, 9]}, windows=windows)
    torch.testing.assert_close(brought, fixed)
    gradients = [torch.autograd.grad(out.square().sum() + lse.sum(), given) for out, lse in (fixed, brought)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_one_graph_serves_all_windows() -> None:
    counter, given = CompileCounterWithBackend("aot_eager"), inputs("whole tiles")
    arguments = CASES["whole tiles"][2]
    attend = torch.compile(lambda w: OP(*given, **arguments, windows=w), backend=counter, fullgraph=True)
    for window in ([1, 1, 1], [3, 1, 2], [0, -4, 99], [1, 1, 3, 2, 2, 2]):
        wanted = OP(*given, **arguments | {"window": [max(size, 1) for size in window]})
        torch.testing.assert_close(attend(torch.tensor(window)), wanted)
    assert counter.frame_count == 2  # one for all heads alike, one for each its own


@pytest.mark.parametrize("windows", [torch.ones(2), torch.ones(1, 3), torch.ones(3, dtype=torch.bool), torch.ones(9)])
def test_a_tensor_of_windows_is_checked(windows: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"windows must be real numbers of shape \(3,\) or \(6,\), three per query"):
        OP(*inputs("whole tiles"), **CASES["whole tiles"][2], windows=windows)


def test_windows_over_everything_are_dense_attention() -> None:
    q, k, v = inputs("short tiles")
    out, _ = OP(q, k, v, **CASES["short tiles"][2] | {"window": (9, 9, 9)})
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["whole tiles", "window per head", "text after", "padded prompt"])
def test_flex_attention_computes_the_same(name: str) -> None:
    (q, k, v), arguments, tiling = inputs(name, batch=1), CASES[name][2], tiling_of(name)
    lists = window_index(tiling.layout, tiling.tile, arguments["window"], text_length=arguments.get("text_length"))
    tiled = map(tiling.to_tiles, (q, k, v))
    flex = flex_attention(*tiled, block_mask=lists.to_block_mask(), enable_gqa=q.shape[1] != k.shape[1])
    torch.testing.assert_close(OP(q, k, v, **arguments)[0], tiling.from_tiles(flex), rtol=1e-4, atol=1e-5)


def test_tile_order_in_and_out() -> None:
    arguments, tiling = CASES["short tiles"][2], tiling_of("short tiles")
    given = inputs("short tiles")
    out, lse = OP(*given, **arguments)
    tiled_out, tiled_lse = OP(*map(tiling.to_tiles, given), **arguments, tiled=True)
    torch.testing.assert_close(tiling.from_tiles(tiled_out), out)
    torch.testing.assert_close(tiling.from_tiles(tiled_lse, dim=-1), lse)


def test_padding_of_keys_is_never_read() -> None:
    arguments, tiling = CASES["short tiles"][2] | {"tiled": True}, tiling_of("short tiles")
    q, k, v = map(tiling.to_tiles, inputs("short tiles"))
    padding = tiling.to_tiles(torch.ones(1, 1, tiling.layout.tokens, 1)) == 0
    out, _ = OP(q, k, v, **arguments)
    spoiled, _ = OP(q, k.masked_fill(padding, 1e4), v.masked_fill(padding, 1e4), **arguments)
    assert padding.any()
    assert torch.equal(out, spoiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", ["text before", "padded prompt", "tile order"])
def test_opcheck(name: str, dtype: torch.dtype, strided: bool) -> None:
    given = [x.requires_grad_(dtype is torch.float32) for x in inputs(name, dtype, strided)]
    torch.library.opcheck(OP.default, tuple(given), CASES[name][2])
    windows = torch.tensor(CASES[name][2]["window"])
    torch.library.opcheck(OP.default, tuple(given), CASES[name][2] | {"windows": windows})


def test_defaults_are_those_of_the_schema_and_the_spec() -> None:
    defaults = {argument.name: argument.default_value for argument in OP.default._schema.arguments}
    for param in backend.BACKEND.params:
        wanted = list(param.default) if isinstance(param.default, tuple) else param.default
        assert defaults[param.name] == wanted
    for function in (backend._forward, backend._check, backend.sliding_tile_attention):
        assert set(same_defaults(OP.default, function)) <= {"tile", "window"}  # a tuple is not a list
        repeated = {name: list(function.__kwdefaults__[name]) for name in ("tile", "window")}
        assert repeated == {name: defaults[name] for name in repeated}


def test_one_graph_serves_all_batches_and_has_gradients() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    arguments = CASES["text after"][2]
    attend = torch.compile(lambda *qkv: OP(*qkv, **arguments)[0], backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 7):  # not 2, the heads: equal sizes would share a symbol
        given = [x.requires_grad_() for x in inputs("text after", batch=batch)]
        out, eager = attend(*given), OP(*given, **arguments)[0]
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), given), torch.autograd.grad(eager.sum(), given), rtol=1e-5, atol=1e-5
        )
    assert counter.frame_count == 1


def policy_of(**layout: Any) -> Policy:
    return Policy([Rule("sta", layout=layout, mode="require", params={"tile": [2, 2, 2], "window": [1, 3, 1]})])


def test_a_rule_with_a_layout_rewrites_a_model() -> None:
    model, x = Blocks(), tokens(2, 4 * 4 * 3 + 5)
    policy = policy_of(grid=[4, 4, 3], text_tokens=5)
    options = {"policy": policy, "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", fullgraph=True, dynamic=True, options=options)
    out = compiled(x)
    dense = [row.decision.backend for row in sparseattn.last_report().rows]
    assert dense == ["sta", "sta"]
    exact = x
    for block in model.blocks:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in block.qkv(exact).chunk(3, dim=-1))
        part, _ = OP(q, k, v, grid=[4, 4, 3], text_tokens=5, tile=[2, 2, 2], window=[1, 3, 1])
        exact = exact + part.transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, exact)
    assert not torch.allclose(out, model(x), atol=1e-3)


def test_a_wrong_grid_is_refused_with_the_arithmetic() -> None:
    options = {"policy": policy_of(grid=[4, 4, 4]), "inner_backend": "aot_eager"}
    compiled = torch.compile(Blocks(), backend="sparseattn", options=options)
    with pytest.raises(BackendCompilerFailed, match="layout 4x4x4 makes 64 tokens, the sequence has 53") as caught:
        compiled(tokens(2, 53))
    assert isinstance(caught.value.inner_exception, RequirementError)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": (6, 6, 9)}, r"grid must make the 288 tokens of the sequence, got 6 \* 6 \* 9 = 324"),
        ({"grid": (6, 6)}, r"grid must be three positive ints"),
        ({"tile": (2, 2)}, r"tile must be three positive ints"),
        (
            {"window": (1, 3)},
            r"window must be three positive ints \(t, h, w\), in tiles, or three for each of the 2 query",
        ),
        ({"window": (1, 3, 3) * 3}, r"got 9 entries"),
        ({"window": (1, 0, 3)}, r"window must be three positive ints"),
        ({"text_length": 3}, r"text_length must be in 0 ... text_tokens = 0, got 3"),
        ({"tiled": True, "tile": (4, 4, 4)}, r"places of the sequence in tile order"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], says: str) -> None:
    given = inputs("whole tiles")
    with pytest.raises(ArgumentError, match=says):
        OP(*given, **CASES["whole tiles"][2] | change)


def test_refusals() -> None:
    q, k, v = inputs("whole tiles")
    with pytest.raises(ArgumentError, match="k must have q's 288 tokens"):
        OP(q, k[:, :, 1:], v[:, :, 1:], **CASES["whole tiles"][2])


def a_call(**more: Any) -> AttentionCall:
    params = backend.BACKEND.complete(tuple(more.pop("params", {}).items()))
    return AttentionCall(1, 4, 4, 4096, 4096, 64, layout=VideoLayout((16, 16, 16)), params=params, **more)


def test_reasons() -> None:
    cpu, spec = Capability.of("cpu"), backend.BACKEND
    assert spec.reasons(a_call(), cpu) == []
    assert spec.reasons(a_call(causal=True), cpu) == ["causal attention is not supported"]
    per_head = a_call(params={"window": (1, 1, 1) * 3})
    assert spec.reasons(per_head, cpu) == ["window is given for 3 heads, the call has 4"]
    assert spec.reasons(a_call(params={"window": (1, 1, 1) * 4}), cpu) == []
    for heads, reasons in ((1, []), (3, ["window is given for 3 heads, the call has 4"]), (4, [])):
        table = Schedule(kind="table", values=((1.0, 1.0, 3.0) * heads, (3.0,) * 3 * heads))
        assert spec.reasons(a_call(params={"window": table}), cpu) == reasons


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "linear", "start": 1.0, "end": 3.0},
        {"kind": "table", "values": [1.0, 3.0]},
        {"kind": "table", "values": [[1.0, 3.0]]},
        {"kind": "table", "values": [[1.0, 3.0, 0.5]]},
        {"kind": "table", "values": [[1.0, 3.0, 0.0]]},
        {"kind": "table", "values": [[1.0, 1.0, 1.0], [1.0] * 6]},
    ],
)
def test_a_schedule_of_windows_is_a_table_of_three_positive_ints(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        PolicyError,
        match=r"window must be (a list of 3 int|in \[1, None\])|must have as many numbers",
    ):
        Rule("sta", params={"window": wrong})
    with pytest.raises(PolicyError, match="tile must be a list of 3 int"):
        Rule("sta", params={"tile": wrong})


def test_wide_windows_do_not_pay() -> None:
    cpu, gpu, ask = Capability.of("cpu"), Capability.of("sm90"), backend.BACKEND.break_even
    assert ask is not None
    full, narrow = a_call(params={"window": (9, 9, 9)}), a_call(params={"tile": (4, 4, 4), "window": (1, 3, 3)})
    says = "the windows are 127% of dense attention, padding included; it pays below"
    assert (ask(full, cpu), ask(full, gpu)) == (f"{says} 60%", f"{says} 100%")
    assert ask(narrow, cpu) is None
    wide = a_call(params={"tile": (4, 4, 4), "window": (3, 4, 4)})
    assert ask(wide, cpu) == "the windows are 75% of dense attention, padding included; it pays below 60%"
    assert ask(wide, gpu) is None
    steps = Schedule(kind="table", values=((1.0, 3.0, 3.0), (3.0, 4.0, 4.0)))  # 9 / 64 and 48 / 64
    assert ask(a_call(params={"tile": (4, 4, 4), "window": steps}), cpu) is None
