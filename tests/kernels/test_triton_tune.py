"""Tuning: candidates, the contest between them, and the command; on GPUs that are not here, by made-up clocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.triton_aot import ARCHS, SHARED_LIMIT, gpu
from support.triton_interpreter import interpret, why_not_interpret
from support.triton_launches import launch_block_sparse, launch_sage
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

import sparseattn
from sparseattn.attn_ops.errors import ArgumentError, SparseAttnError, UnsupportedError
from sparseattn.attn_ops.kernels.triton import contest, tiles, tuned_file
from sparseattn.attn_ops.kernels.triton.contest import Outcome
from sparseattn.attn_ops.kernels.triton.tile import Tile
from sparseattn.attn_ops.kernels.triton.tuned_file import Gpu, Measured
from sparseattn.attn_ops.kernels.triton.tuned_tiles import SWITCH, TileChoice, tunable, use_tiles
from sparseattn.attn_ops.kernels.triton.workloads import KERNELS, Mode, Sizes, Workload, workloads
from sparseattn.fx_passes import tune as tune_module
from sparseattn.fx_passes.cli import main

BF16 = torch.bfloat16
H100 = Gpu("NVIDIA H100", 90)
BLOCKS = ((64, 64), (128, 64), (128, 128), (96, 20), (16, 16), (384, 384))
TABLES = [
    *(tiles.block_sparse_tile, tiles.block_sparse_grad_q_tile, tiles.block_sparse_grad_kv_tile),
    *(tiles.sage_tile, tiles.sparge_tile),
]


def keys(choice: TileChoice) -> list[tuple[int, ...]]:
    """Every key that an entry of the table could have, of these blocks."""
    sizes = {
        "sage": [(dim,) for dim in (32, 64, 128, 256)],
        "sparge": [(dim, *pair, grows) for dim in (32, 64, 128, 256) for pair in BLOCKS for grows in (False, True)],
    }
    default = [(size, dim, *pair) for size in (2, 4) for dim in (16, 32, 64, 128, 256) for pair in BLOCKS]
    return [(arch, *key) for arch in ARCHS for key in sizes.get(choice.kernel, default)]


@pytest.mark.parametrize("choice", TABLES, ids=lambda choice: choice.kernel)
def test_candidates_are_few_and_next_to_the_table(choice: TileChoice) -> None:
    for key in keys(choice):
        table, *others = choice.candidates(*key)
        assert table == choice.table(*key)
        assert len({table, *others}) == 1 + len(others)
        assert 1 <= len(others) <= 5
        for tile in others:
            assert sum(ours != theirs for ours, theirs in zip(tile[::-1], table[::-1], strict=True)) <= 2
            assert min(tile.rows, tile.keys) >= 16
            assert tile.rows * tile.keys // tile.warps <= table.rows * table.keys // min(table.warps, 4)
            assert 4 <= tile.warps <= 8
            assert tile.stages >= 2 or tile.stages == table.stages


def test_what_is_part_of_the_result_stays() -> None:
    """The tile that sparge's second stage judges, and the keys that FP8 tensor cores sum over."""
    for choice, sides in ((tiles.sparge_tile, ("rows", "keys")), (tiles.sage_tile, ("keys",))):
        for key in keys(choice):
            of_all = {tuple(getattr(tile, side) for side in sides) for tile in choice.candidates(*key)}
            assert len(of_all) == 1


@pytest.mark.parametrize(
    ("arch", "choice", "key", "launch"),
    [
        (90, tiles.block_sparse_tile, (2, 128, 64, 64), lambda: launch_block_sparse(BF16, 128, 64, masked=True)),
        (80, tiles.sage_tile, (64,), lambda: launch_sage(BF16, 64, "fp16", masked=True)),
    ],
    ids=["block_sparse", "sage"],
)
def test_candidates_compile_without_spills(
    arch: int, choice: TileChoice, key: tuple[int, ...], launch: Callable[[], None]
) -> None:
    for tile in choice.candidates(arch, *key):
        with gpu(arch) as kernels, use_tiles({(choice.kernel, (arch, *key)): tile}):
            launch()
        assert kernels[-1].name == "_forward"
        assert kernels[-1].warps == tile.warps
        assert kernels[-1].spilled == 0, tile
        assert kernels[-1].shared <= SHARED_LIMIT[arch], tile


class _Asked(dict[Any, Any]):
    """No tiles; notes whose are asked for."""

    def get(self, key: Any, default: Any = None) -> Any:
        self[key] = None
        return default


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_calls_of_a_workload_ask_for_its_key(kernel: str, arch: int) -> None:
    every = itertools.product((torch.float32, BF16), (16, 80, 128), ((64, 64), (128, 64)))
    for dtype, head_dim, blocks in every:
        sizes = Sizes(dtype, head_dim, blocks, "cpu", heads=2, seq=256)
        with interpret(arch), mock.patch.object(JITFunction, "run", return_value=None):
            for workload in workloads(kernel, sizes, arch):
                for call in (*workload.small(), *workload.timed()):
                    with use_tiles(asked := _Asked()):
                        call()
                    ours = {name for name in asked if name[0] == workload.choice.kernel}
                    assert ours == {(workload.choice.kernel, workload.key)}


class _Clock:
    """The time of a tile is made up; it is the one that the table returns while the call is timed."""

    def __init__(self, choice: TileChoice, key: tuple[int, ...], times: Callable[[Tile], float]) -> None:
        self._tile, self._times = lambda: choice(*key), times

    def milliseconds(self, call: Callable[[], object]) -> float:
        return self._times(self._tile())


@pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_candidate_computes_the_same(kernel: str) -> None:
    sizes = Sizes(BF16, 32, (32, 32), "cpu")
    with interpret(90):
        workload = workloads(kernel, sizes, 90)[0]

        def make(of: Sizes, mode: Mode) -> Callable[[], tuple[Tensor, ...]]:
            return (lambda: ()) if of is sizes else workload.make(of, mode)  # what is timed would be long

        choice, key = workload.choice, workload.key
        table, *_, last = choice.candidates(*key)
        masked = workload._replace(make=make, modes=workload.modes[-1:])
        outcome = contest.contest(masked, _Clock(choice, key, lambda tile: 1.0 if tile == last else 2.0))
    assert outcome == (choice, key, Measured(last, 1.0, 2.0), {})
    assert table != last


@tunable(owned="rows", walked="keys")
def toy_tile(_arch: int) -> Tile:
    return Tile(64, 64, 4, 3)


def toy(result: Callable[[Tile], Tensor]) -> Workload:
    def make(_sizes: Sizes, _mode: Mode) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (result(toy_tile(90)),)

    return Workload(toy_tile, (90,), Sizes(BF16, 64, (64, 64), "cpu"), make, (Mode(False),), 1e-2)


def toy_contest(result: Callable[[Tile], Tensor], times: Callable[[Tile], float]) -> Outcome:
    return contest.contest(toy(result), _Clock(toy_tile, (90,), times))


def test_a_wrong_candidate_is_not_timed() -> None:
    def result(tile: Tile) -> Tensor:
        if tile.stages == 4:
            raise OutOfResources(300_000, 232_448, "shared memory")
        off = {8: 1.5, 4: 1.0}[tile.warps] if tile.rows == 64 else float("nan")
        return torch.tensor([1.0, 2.0, float("-inf")]) * off

    outcome = toy_contest(result, lambda tile: {32: 1.0, 64: 2.0}[tile.keys])
    assert outcome.measured == (Tile(64, 32, 4, 3), 1.0, 2.0)
    assert outcome.refused == {
        Tile(64, 64, 4, 4): "out of resource: shared memory, Required: 300000, Hardware limit: 232448",
        Tile(64, 64, 8, 3): "off by 5.0e-01, and 1e-02 is allowed",
        Tile(32, 64, 4, 3): "off by nan, and 1e-02 is allowed",
    }


def test_infinities_must_be_where_they_were() -> None:
    outcome = toy_contest(
        lambda tile: torch.tensor([1.0, float("-inf") if tile.warps == 4 else 1.0]), lambda tile: 1.0 / tile.warps
    )
    assert list(outcome.refused.values()) == ["off by inf, and 1e-02 is allowed"]


@pytest.mark.parametrize(("ms", "wins"), [(0.98, False), (0.96, True)])
def test_noise_does_not_win(ms: float, wins: bool) -> None:
    """The median of the turns counts, and another tile must be 3 % faster."""
    turn = itertools.count()

    def times(tile: Tile) -> float:
        return (0.1 if next(turn) % 7 == 0 else ms) if tile.stages == 2 else 1.0

    measured = toy_contest(lambda _: torch.ones(2), times).measured
    assert measured == ((Tile(64, 64, 4, 2), ms, 1.0) if wins else (Tile(64, 64, 4, 3), 1.0, 1.0))


@pytest.fixture
def contests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """A GPU on which the last candidate is twice as fast; what was measured there."""
    held: list[tuple[str, tuple[int, ...]]] = []

    def contest_of(workload: Workload, _clock: object) -> Outcome:
        held.append((workload.choice.kernel, workload.key))
        last = workload.choice.candidates(*workload.key)[-1]
        return Outcome(workload.choice, workload.key, Measured(last, 0.25, 0.5), {})

    monkeypatch.setattr(tune_module, "gpu_at", lambda _device: H100)
    monkeypatch.setattr(contest, "contest", contest_of)
    monkeypatch.setattr(contest, "CudaClock", lambda _device: None)
    monkeypatch.setenv("SPARSEATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(SWITCH)
    return held


def test_each_key_is_measured_once(contests: list[Any]) -> None:
    """BF16 and FP16 share their tiles, 80 and 128 channels too, and what the file has is read."""
    tuning = sparseattn.tune(dtypes=[BF16, torch.float16], head_dims=[80, 128], blocks=[(64, 64)], progress=False)
    gradients = [(kernel, (90, 2, 128, 64, 64)) for kernel in KERNELS[:3]]
    sparge = [("sparge", (90, 128, 64, 64, grows)) for grows in (False, True)]
    assert contests == [*gradients, ("sage", (90, 128)), *sparge]
    assert tuned_file.known(H100) == {(o.choice.kernel, o.key): o.measured for o in tuning.outcomes}
    again = sparseattn.tune(head_dims=[128], blocks=[(64, 64)], progress=False)
    assert (again.outcomes, len(contests)) == (tuning.outcomes, 6)
    sparseattn.tune(kernels=["sage"], head_dims=[128], force=True, progress=False)
    assert contests[6:] == [("sage", (90, 128))]


def test_what_was_measured_before_an_interruption_is_kept(contests: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = contest.contest

    def interrupted(workload: Workload, clock: object) -> Outcome:
        if workload.choice is tiles.sage_tile:
            raise KeyboardInterrupt
        return measure(workload, clock)

    monkeypatch.setattr(contest, "contest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparseattn.tune(kernels=["block_sparse", "sage"], head_dims=[64], blocks=[(64, 64)], progress=False)
    assert list(tuned_file.known(H100)) == [("block_sparse", (90, 2, 64, 64, 64))]


def test_the_command(contests: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--kernels", "block_sparse", "--head-dims", "64", "--blocks", "64x64"]) == 0
    heading, row, last = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "kernel"
    assert re.split(" {2,}", row) == [
        *("block_sparse", "itemsize 2, dim 64, block_q 64, block_k 64"),
        *("64x64 w4 s3", "0.500", "64x32 w4 s3", "0.250", "2.00"),
    ]
    assert last == f"1 tiles in {tuned_file.find(H100)}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kernels", "sage,pool"], "kernels must name kernels. Known: block_sparse, "),
        (["--dtypes", "int8"], "dtypes must be of float32, float16, bfloat16, got [torch.int8]."),
        (["--head-dims", "512"], "head_dims must be numbers from 1 to 256, got [512]."),
        (["--head-dims", "x"], "--head-dims must be like 64,64, got 'x'."),
        (["--blocks", "64"], "--blocks must be like 64x64,64x64, got '64'."),
        (["--blocks", "0x64"], "blocks must be pairs of numbers from 1 on, got [(0, 64)]."),
    ],
)
def test_wrong_use_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"tune: {told}")


def test_without_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="device must be a GPU of CUDA that is here, got cpu"):
        sparseattn.tune(device="cpu")
    with pytest.raises(ArgumentError, match="head_dims must be numbers"):
        sparseattn.tune(head_dims=[])


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_measured(
    contests: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(SparseAttnError, match=r"tune: no cache folder can be written to: .* Set SPARSEATTN_CACHE_DIR"):
        sparseattn.tune()
    assert not contests
