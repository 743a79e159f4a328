"""The file of tuned tiles: what it keeps, who may not use it, and which tile a launch takes."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.triton_aot import gpu
from support.triton_launches import launch_block_sparse

from sparseattn.attn_ops.kernels.triton import tuned_file, tuned_tiles
from sparseattn.attn_ops.kernels.triton.tile import Tile
from sparseattn.attn_ops.kernels.triton.tiles import block_sparse_tile
from sparseattn.attn_ops.kernels.triton.tuned_file import Gpu, Measured, TunedFileError

H100 = Gpu("NVIDIA H100", 90)
KEY = (90, 2, 64, 64, 64)
NAME = "block_sparse", KEY
TUNED = Measured(Tile(64, 64, 8, 3), 0.5, 1.0)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and an H100 that launches."""
    monkeypatch.setenv("SPARSEATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(tuned_tiles.SWITCH)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Gpu, "at", lambda _device: H100)
    tuned_tiles.tuned_tiles.cache_clear()
    yield tmp_path
    tuned_tiles.tuned_tiles.cache_clear()


def test_what_is_added_is_read_beside_what_was_there() -> None:
    other = "sparge", (90, 128, 128, 64, True)
    assert tuned_file.known(H100) == {}
    file = tuned_file.add(H100, {NAME: TUNED})
    assert tuned_file.add(H100, {other: TUNED}) == file == tuned_file.find(H100)
    assert tuned_file.read(file, H100) == {NAME: TUNED, other: TUNED}
    later = TUNED._replace(ms=0.4)
    tuned_file.add(H100, {NAME: later})
    assert tuned_file.known(H100) == {NAME: later, other: TUNED}
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_another_gpu_triton_or_source_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_file.add(H100, {NAME: TUNED})
    assert tuned_file.find(Gpu("NVIDIA H100 PCIe", 90)) is None
    assert tuned_file.find(Gpu("NVIDIA H100", 100)) is None
    monkeypatch.setattr(tuned_file.triton, "__version__", "9.9")
    assert tuned_file.find(H100) is None
    monkeypatch.undo()
    monkeypatch.setattr(tuned_file, "_source_hash", lambda: "0")
    assert tuned_file.find(H100) is None


def _cut(text: str) -> str:
    return text[: len(text) // 2]


DAMAGES = {
    "cut": (_cut, "it is damaged"),
    "empty": (lambda _: "", "it is damaged"),
    "no object": (lambda _: "[]", "it is damaged"),
    "no tiles": (lambda text: json.dumps({**json.loads(text), "tiles": None}), "it is damaged"),
    "edited": (lambda text: text.replace("[64, 64, 8, 3]", "[64, 64, 8, 4]"), "it is damaged"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_not_used_and_told_once(damage, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tuned_file.add(H100, {NAME: TUNED})
    file.write_text(damage(file.read_text()))
    assert block_sparse_tile(*KEY) == block_sparse_tile(*KEY) == block_sparse_tile.table(*KEY)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"Triton kernels: {file} is not used: {reason}. Delete it, or make it anew: sparseattn tune"
    )
    assert tuned_tiles.detail() == f"tiles of the tables, not of {file}: {reason}"
    tuned_file.add(H100, {NAME: TUNED})
    assert tuned_file.read(file, H100) == {NAME: TUNED}


def test_a_file_of_another_gpu_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    A100 = Gpu("NVIDIA A100", 80)
    foreign = tuned_file.add(A100, {NAME: TUNED})
    ours = tuned_file.add(H100, {NAME: TUNED})
    foreign.rename(ours)
    with pytest.raises(TunedFileError, match=r"it is that of .*NVIDIA A100.*, not of .*NVIDIA H100"):
        tuned_file.read(ours, H100)
    assert block_sparse_tile(*KEY) == block_sparse_tile.table(*KEY)
    assert "NVIDIA A100" in caplog.text


def test_a_file_that_cannot_be_read_is_told(folder: Path) -> None:
    file = tuned_file.add(H100, {NAME: TUNED})
    file.unlink()
    file.mkdir()
    with pytest.raises(TunedFileError, match="it cannot be read: Is a directory"):
        tuned_file.read(file, H100)


def test_a_write_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    file = tuned_file.add(H100, {NAME: TUNED})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tuned_file.add(H100, {NAME: TUNED._replace(ms=0.1)})
    assert tuned_file.read(file, H100) == {NAME: TUNED}
    assert list(folder.iterdir()) == [file]


def _add_five(process: int, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    for dim in range(5):
        tuned_file.add(H100, {("sage", (process, dim)): TUNED})


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=_add_five, args=(process, start)) for process in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(tuned_file.known(H100)) == [("sage", (process, dim)) for process in range(4) for dim in range(5)]
    assert len(os.listdir(folder)) == 1


def test_a_launch_takes_the_tuned_tile_for_every_length_and_reads_the_file_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[Path] = []
    read = tuned_tiles.read
    monkeypatch.setattr(tuned_tiles, "read", lambda file, gpu: (reads.append(file), read(file, gpu))[1])
    file = tuned_file.add(H100, {NAME: TUNED})
    with gpu(90) as kernels:
        for seq in (128, 256, 1024, 4096):
            launch_block_sparse(torch.bfloat16, 64, 64, False, seq, seq)
    (kernel,) = kernels
    assert (kernel.warps, len(kernel.launches)) == (8, 4)
    assert reads == [file]
    assert tuned_tiles.detail() == f"tuned tiles, 1 in {file}"


def test_other_keys_are_those_of_the_table() -> None:
    tuned_file.add(H100, {NAME: TUNED})
    assert block_sparse_tile(*KEY) == TUNED.tile
    for key in ((80, 2, 64, 64, 64), (90, 4, 64, 64, 64), (90, 2, 128, 64, 64), (90, 2, 64, 128, 64)):
        assert block_sparse_tile(*key) == block_sparse_tile.table(*key)


def test_without_a_gpu_in_use_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_file.add(H100, {NAME: TUNED})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert block_sparse_tile(*KEY) == block_sparse_tile.table(*KEY)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_file.add(H100, {NAME: TUNED})
    monkeypatch.setenv("SPARSEATTN_TUNED_TILES", "0")
    assert block_sparse_tile(*KEY) == block_sparse_tile.table(*KEY)
    assert tuned_tiles.detail() == "tiles of the tables: SPARSEATTN_TUNED_TILES=0"


def test_not_tuned_is_told() -> None:
    assert tuned_tiles.detail() == "tiles of the tables: none were tuned on NVIDIA H100 (sparseattn tune)"
