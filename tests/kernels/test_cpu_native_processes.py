"""Processes that need the native CPU kernel at once: one builds it for all, and what goes wrong harms no other."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_compiler import COPY, fake_compiler

from sparseattn.attn_ops.kernels.cpu.native import build

SCRIPT = Path(__file__).parents[1] / "support" / "first_uses.py"
PROCESSES = 32


@pytest.fixture(scope="module")
def kernel_file() -> Path:
    """The kernel of this machine."""
    try:
        return build.library_path()[0]
    except build.BuildError as error:
        pytest.skip(f"no native kernel: {error}")


def first_uses(folder: Path, compiler: str, processes: int, *options: str) -> tuple[list[str], list[str]]:
    """What the processes print and what they log, with a cache in `folder`."""
    settings = {"CXX": compiler, "SPARSEATTN_CACHE_DIR": str(folder / "cache"), "SPARSEATTN_CPU_KERNEL": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(processes), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if line.startswith("CPU kernel")]


def assert_same_result(printed: list[str], served_by: str) -> None:
    assert len(set(printed)) == 1
    assert printed[0].startswith(served_by)


def counted(folder: Path, body: str) -> str:
    """A compiler that writes down what it links."""
    return fake_compiler(folder, f'case "$*" in *-shared*) echo link >> {folder}/links;; esac\n{body}')


def links(folder: Path) -> int:
    return (folder / "links").read_text().count("link")


def test_one_process_builds_for_all(kernel_file: Path, tmp_path: Path) -> None:
    compiler = counted(tmp_path, f'exec {shlex.join(build.compiler_command())} "$@" -O0')
    printed, logged = first_uses(tmp_path, compiler, PROCESSES)
    assert len(printed) == PROCESSES
    assert_same_result(printed, "native kernel")
    assert not logged
    assert len(list((tmp_path / "cache").iterdir())) == links(tmp_path) == 1


def test_several_builds_at_once_where_nothing_can_be_locked(kernel_file: Path, tmp_path: Path) -> None:
    compiler = counted(tmp_path, f"sleep 0.5; {COPY.format(kernel_file)}")
    printed, _ = first_uses(tmp_path, compiler, PROCESSES, "--no-locks")
    assert len(printed) == PROCESSES
    assert_same_result(printed, "native kernel")
    assert links(tmp_path) > 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_killed_build_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, kernel_file: Path, tmp_path: Path
) -> None:
    killed = f"if mkdir {tmp_path}/killed 2> /dev/null; then echo half > $last; kill -9 $PPID; exit 1; fi"
    compiler = counted(tmp_path, f"for last; do :; done; {killed}\n{COPY.format(kernel_file)}")
    printed, logged = first_uses(tmp_path, compiler, 8)
    assert len(printed) == 7
    assert_same_result(printed, "native kernel")
    assert not logged
    (file,) = (tmp_path / "cache").glob("*.so")
    assert file.read_bytes().startswith(kernel_file.read_bytes())

    before = links(tmp_path)
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("SPARSEATTN_CACHE_DIR", str(tmp_path / "cache"))
    assert build.library_path()[0] == file
    assert links(tmp_path) == before


def test_a_broken_compiler_is_said_once_by_each(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, "echo 'x.cpp:3: error: no such thing' >&2; exit 1")
    printed, logged = first_uses(tmp_path, compiler, PROCESSES)
    assert len(printed) == len(logged) == PROCESSES
    assert_same_result(printed, "gathered blocks: no native kernel, because the compiler")
    assert all("x.cpp:3: error: no such thing" in line for line in logged)
    assert not any((tmp_path / "cache").iterdir())
