"""Run a rewritten model without Python: export it, build the op library and the runner, compare the outputs.

    python examples/cpp_runner/run.py [--out FOLDER] [--tokens 4096]

Needs a C++ compiler and takes about a minute. What a program of your own has to do is in main.cpp; what it has to ship,
in docs/export_cpp.md.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sparseattn

CHANNELS, HEADS, REPEATS = 256, 4, 5
POLICY = {"rules": [{"use": "block_topk", "mode": "require", "params": {"keep_ratio": 0.1}}]}


class Layer(nn.Module):
    """Self-attention as models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, channels)."""
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2))


def export(model: nn.Module, x: Tensor, folder: Path) -> Path:
    """The model as a package that runs without Python, for any number of tokens."""
    tokens = torch.export.Dim("tokens", min=256, max=65536)
    program, report = sparseattn.rewrite(torch.export.export(model, (x,), dynamic_shapes=({1: tokens},)), POLICY)
    print(report)
    return sparseattn.export.aoti(sparseattn.export.for_cpp(program), folder / "model.pt2", report)


def build_runner(folder: Path) -> Path:
    """The program of main.cpp."""
    runner = folder / "runner"
    script = Path(__file__).with_name("build.sh")
    subprocess.run([script, Path(torch.__file__).parent, runner], check=True)
    return runner


class Made(NamedTuple):
    """A file, and the seconds that making it took."""

    path: Path
    seconds: float


class Compared(NamedTuple):
    """The files, milliseconds of a run in C++ and Python, and of the dense model; the largest difference of outputs."""

    package: Made
    library: Made
    runner: Made
    cpp_ms: float
    python_ms: float
    dense_ms: float
    difference: float


def timed(what: str, make: Callable[[], Path]) -> Made:
    """What `make` returns, once it has said how long it took."""
    start = time.perf_counter()
    made = Made(make(), time.perf_counter() - start)
    print(f"{what}: {made.seconds:.1f} s, {made.path.stat().st_size / 1e6:.1f} MB")
    return made


def median_ms(call: Callable[[], object]) -> float:
    """The median time of a few calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> Compared:
    """Export, build, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("cpp_out"))
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args(arguments)
    folder: Path = given.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, x = Layer().eval(), torch.randn(1, given.tokens, CHANNELS)

    package = timed("package", lambda: export(model, x, folder))
    library = timed(
        "op library", lambda: sparseattn.export.build_library(folder / "libsparseattn_ops.so", package=package.path)
    )
    runner = timed("runner", lambda: build_runner(folder))

    torch.save((x,), folder / "inputs.pt")
    files = [runner.path, library.path, package.path, folder / "inputs.pt", folder / "outputs.pt"]
    command = [*files, str(REPEATS)]
    # As many threads as Python has, so that the times can be compared.
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=threads).stdout
    print(told, end="")
    (output,) = torch.load(folder / "outputs.pt")

    in_python = torch._inductor.aoti_load_package(str(package.path))
    in_cpp = float(re.search(r"runs: ([\d.]+) ms", told)[1])
    error = float((output - in_python(x)).abs().max())
    compared = Compared(
        package, library, runner, in_cpp, median_ms(lambda: in_python(x)), median_ms(lambda: model(x)), error
    )
    print(f"package in Python: {compared.python_ms:.1f} ms")
    print(f"dense model in Python: {compared.dense_ms:.1f} ms")
    print(f"largest difference between C++ and Python: {error:.1e}")
    assert error <= 1e-5
    return compared


if __name__ == "__main__":
    main()
