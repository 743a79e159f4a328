"""The build of the native CPU kernel: its cache, its failures, and the gathered path behind them."""

from __future__ import annotations

import _ctypes
import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.fake_compiler import COPY, fake_compiler

from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.kernels.cpu import gathered
from sparseattn.attn_ops.kernels.cpu.native import build, library
from sparseattn.fx_passes.cli import main


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, and no outcome of another test."""
    monkeypatch.setenv("SPARSEATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    library.kernel.cache_clear()
    yield
    library.kernel.cache_clear()


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
        (f"ulimit -f 1; {COPY.format(sys.executable)} && exit 0; exit 1", "failed with exit code"),
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


def test_full_disk_while_compiling(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for it: the compiler is stopped in the middle of one."""
    try:
        compiler = shlex.join(build.compiler_command())
    except build.BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, f'ulimit -f 16; exec {compiler} "$@" -O0'))
    assert_gathered()
    (record,) = caplog.records
    assert "failed with exit code" in record.getMessage()
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


def test_cache_folder_in_which_nothing_can_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = "/proc/self/fdinfo"  # not for root either
    monkeypatch.setenv("SPARSEATTN_CACHE_DIR", folder)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "exit 1"))
    assert_gathered()
    (record,) = caplog.records
    assert folder in record.getMessage()


def test_full_cache_folder_need_not_be_writable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COPY.format(_ctypes.__file__)))
    built, _ = build.library_path()
    monkeypatch.setattr(build, "writable", lambda _folders: pytest.fail("nothing is to be written"))
    built.parent.chmod(0o500)
    assert build.library_path()[0] == built


# The second stands for a folder that may not be looked into: root may look into all.
@pytest.mark.parametrize("cache", ["file", "x" * 300], ids=["cannot be made", "cannot be looked into"])
def test_temporary_folder_where_the_home_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("SPARSEATTN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COPY.format(_ctypes.__file__)))
    path, _ = build.library_path()
    assert path.parent == tmp_path / f"sparseattn_{os.getuid()}"
    assert path.read_bytes().startswith(Path(_ctypes.__file__).read_bytes())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_no_avx2(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("_is_avx512_supported", "_is_avx2_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert_gathered()
    assert "the CPU has no AVX2" in caplog.text or "it is written for x86-64" in caplog.text


def test_what_changes_the_kernel_is_a_new_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, compiler = tmp_path / "source", fake_compiler(tmp_path, COPY.format(_ctypes.__file__))
    shutil.copytree(build.FOLDER, source)
    monkeypatch.setattr(build, "FOLDER", source)
    monkeypatch.setenv("CXX", compiler)
    found = [build.library_path()]
    monkeypatch.setenv("CXX", f"{compiler} -g")
    found.append(build.library_path())
    monkeypatch.setattr(build, "_version", lambda _compiler: "fake 2.0")
    found.append(build.library_path())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    found.append(build.library_path())
    (source / "gemm.h").write_text("")
    found.append(build.library_path())
    assert len(set(found)) == 5
    assert build.library_path() == found[-1]


@pytest.mark.parametrize(
    "damage",
    [lambda file: file[:1000], lambda file: file[: len(file) // 2], lambda file: file[:4096] + bytes(len(file) - 4096)],
    ids=["start", "half", "zeros"],
)
def test_a_damaged_file_is_built_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """To load half a library is a bus error: only another process could tell."""
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COPY.format(_ctypes.__file__)))
    built, _ = build.library_path()
    whole = built.read_bytes()
    built.unlink()  # this process has it mapped
    built.write_bytes(damage(whole))
    assert build.library_path()[0] == built
    assert built.read_bytes() == whole


def test_a_file_that_does_not_load_is_built_anew_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    links = tmp_path / "links"
    body = f'case "$*" in *-shared*) echo link >> {links};; esac; {COPY.format(_ctypes.__file__)}'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    built, _ = build.library_path()
    built.unlink()
    built.write_text("no library")
    build._seal(str(built))
    assert build.library_path() == build.library_path()
    assert links.read_text() == "link\n" * 2


def test_what_a_killed_build_left_is_removed_when_it_is_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, age in (("build-old", 2 * 3600), ("build-new", 60)):
        (cache / name).mkdir(parents=True)
        (cache / name / "unit.o").write_text("half")
        os.utime(cache / name, (time.time() - age,) * 2)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COPY.format(_ctypes.__file__)))
    built, _ = build.library_path()
    assert {entry.name for entry in cache.iterdir()} == {built.name, "build-new"}


def test_the_disk_has_the_file_before_it_has_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (done.append(name), real(*given))[1])
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COPY.format(_ctypes.__file__)))
    build.library_path()
    assert done == ["fsync", "replace"]


def test_threads_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    links = tmp_path / "links"
    body = f'sleep 0.1; case "$*" in *-shared*) echo link >> {links};; esac; {COPY.format(_ctypes.__file__)}'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, body))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: library.kernel().detail, range(8)))
    assert set(found) == {f"native kernel, {build.instruction_set()}"}
    assert links.read_text() == "link\n"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_command_line_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo 'error: no such thing' >&2; exit 1"))
    assert main(["backends", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["providers"]
    served = next(row["detail"] for row in rows if (row["backend"], row["provider"]) == ("block_sparse", "cpu"))
    assert served == library.detail()
    assert served.startswith("gathered blocks: no native kernel, because the compiler")
    assert served.endswith("error: no such thing")
