"""The build of the native CPU kernel: its cache, its failures, and the gathered path behind them."""

from __future__ import annotations

import _ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.kernels.cpu import gathered
from sparseattn.attn_ops.kernels.cpu.native import build, library

# A compiler whose output can be loaded.
_COPY = f"for last; do :; done; cp {_ctypes.__file__} $last"
_FIRST_USE = """
import torch
from sparseattn.attn_ops.kernels.cpu.native.library import kernel
torch.manual_seed(0)
q = torch.randn(1, 1, 128, 16)
index, count = torch.zeros(1, 1, 2, 1, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32)
out, _ = torch.ops.sparseattn.block_sparse_attention(q, q, q, index, count, block_q=64, block_k=64)
print(kernel().detail, float(out.double().sum()))
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, and no outcome of another test."""
    monkeypatch.setenv("SPARSEATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    library.kernel.cache_clear()
    yield
    library.kernel.cache_clear()


def fake_compiler(tmp_path: Path, body: str) -> str:
    path = tmp_path / "fake-c++"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1.0; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


def assert_gathered() -> None:
    """The op gives what the gathered path gives, to the bit."""
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
    lists = BlockIndex.from_mask(torch.eye(5, dtype=torch.bool), block_q=16, block_k=16, seq_q=70, seq_k=70)
    op = torch.ops.sparseattn.block_sparse_attention
    out, lse = op(q, k, v, lists.index, lists.count, block_q=16, block_k=16, provider="cpu")
    expected = gathered.attention(
        *(q, k, v, lists.index, lists.count, None), block_q=16, block_k=16, causal=False, scale=0.25
    )
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    with caplog.at_level(logging.INFO, logger="sparseattn"):
        assert_gathered()
        assert_gathered()
    assert library.detail() == "gathered blocks: SPARSEATTN_CPU_KERNEL=0"
    assert [record.getMessage() for record in caplog.records] == [f"CPU kernel: {library.detail()}"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'x.cpp:3: error: no such thing' >&2; exit 1", "failed with exit code 1: x.cpp:3: error: no such thing"),
        ("kill -9 $$", "failed with exit code -9: no message"),
        ("for last; do :; done; head -c 1000 /dev/zero > $last", "invalid ELF header"),
        ("for last; do :; done; printf half > $last; echo 'No space left on device' >&2; exit 1", "No space left"),
    ],
    ids=["error", "killed", "nonsense", "disk full"],
)
def test_broken_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, body: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    assert_gathered()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name.startswith("sparseattn.")
    assert reason in record.getMessage()
    assert reason in library.detail()
    assert not any((tmp_path / "cache").iterdir())


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_gathered()
    assert "there is no C++ compiler" in caplog.text
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    library.kernel.cache_clear()
    assert_gathered()
    assert "missing does not run" in caplog.text


def test_cache_that_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "exit 1"))
    assert_gathered()
    assert "no cache folder can be written to" in caplog.text


def test_temporary_folder_where_the_home_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("SPARSEATTN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, _COPY))
    path, _ = build.library_path()
    assert path.parent == tmp_path / f"sparseattn_{os.getuid()}"
    assert path.read_bytes() == Path(_ctypes.__file__).read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_no_avx2(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("_is_avx512_supported", "_is_avx2_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert_gathered()
    assert "the CPU has no AVX2" in caplog.text or "it is written for x86-64" in caplog.text


def test_a_new_compiler_or_source_is_a_new_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, _COPY))
    first, _ = build.library_path()
    assert build.library_path()[0] == first
    monkeypatch.setattr(build, "_version", lambda _compiler: "fake 2.0")
    assert build.library_path()[0] != first


def test_first_use_in_four_processes_at_once(tmp_path: Path) -> None:
    try:
        build.instruction_set()
        build.compiler_command()
    except build.BuildError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-c", _FIRST_USE]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    assert printed[0].startswith("native kernel")
    assert len(set(printed)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
