"""Ship the tiny video model in three formats: torch.export, AOTInductor and ONNX, its sparse attention inside.

    python examples/export_all.py

Every file is loaded in a process of its own, which knows nothing of the model, and compared with the compiled model.
The table: what is in the file, how long making, loading and running it takes, and the relative L2 error. About two
minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

INPUTS = ("hidden_states", "timestep", "encoder_hidden_states")
FORMATS = {"torch.export": "model.pt2", "AOTInductor": "package.pt2", "ONNX": "model.onnx"}
_TURNS = 5
_TOLERANCE = {"torch.export": 1e-5, "AOTInductor": 1e-5, "ONNX": 1e-4}

Arrays = dict[str, np.ndarray]


class Shipped(NamedTuple):
    """One format: the size of its file in MiB, the seconds it takes, and the relative L2 error."""

    format: str
    mib: float
    make: float
    load: float
    run: float
    error: float


class Loaded(NamedTuple):
    """What a fresh process measured, in seconds, and what the model gave."""

    load: float
    run: float
    output: np.ndarray


def exported_program(path: Path, inputs: Arrays) -> Callable[[], Any]:
    """Load what `export.save` wrote: torch, and sparseattn for the ops."""
    import torch

    import sparseattn

    program, _ = sparseattn.export.load(path)
    module = program.module()
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return torch.no_grad()(lambda: module(**tensors, return_dict=False)[0])


def package(path: Path, inputs: Arrays) -> Callable[[], Any]:
    """Load what `export.aoti` wrote: torch, and sparseattn for the ops."""
    import torch

    import sparseattn

    assert sparseattn.ops  # registered before the package is loaded
    model = torch._inductor.aoti_load_package(str(path))
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return lambda: model(**tensors, return_dict=False)[0]


def session(path: Path, inputs: Arrays) -> Callable[[], Any]:
    """Load what `export.onnx` wrote: onnxruntime, and nothing of ours."""
    import onnxruntime

    model = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda: model.run(None, inputs)[0]


LOADERS = {"torch.export": exported_program, "AOTInductor": package, "ONNX": session}


def child(name: str, folder: Path) -> None:
    """Load one file and run it; what comes out goes to the folder."""
    inputs = dict(np.load(folder / "inputs.npz"))
    start = time.perf_counter()
    run = LOADERS[name](folder / FORMATS[name], inputs)
    output = run()
    load, times = time.perf_counter() - start, []
    for _ in range(_TURNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    np.save(folder / "output.npy", np.asarray(output))
    print(json.dumps({"load": load, "run": statistics.median(times)}))


def in_fresh_process(name: str, folder: Path) -> Loaded:
    """Run `child` in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    return Loaded(**json.loads(told), output=np.load(folder / "output.npy"))


def ship(frames: int, formats: Sequence[str], folder: Path) -> list[Shipped]:
    """Export, reload, compare, and print the table."""
    import torch

    import sparseattn
    from sparseattn import Policy, Rule

    sys.path.insert(0, str(Path(__file__).with_name("tiny_video")))
    from model import initial_noise, load_model
    from shapes import sample_captions

    model = load_model()
    caption = sample_captions(1, torch.Generator().manual_seed(7), most=2)
    values = initial_noise(1, frames, 7), torch.tensor([500.0]), caption
    inputs = dict(zip(INPUTS, values, strict=True))
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    policy = Policy([Rule("block_topk", kind="self", params={"keep_ratio": 0.25})])

    compiled = torch.compile(model, backend="sparseattn", options={"policy": policy})
    with torch.no_grad():
        wanted = compiled(**inputs, return_dict=False)[0].numpy()
        exported = torch.export.export(model, (), {**inputs, "return_dict": False})
    program, report = sparseattn.rewrite(exported, policy)
    print(report.summary(), end="\n\n")
    makers = {
        "torch.export": lambda path: sparseattn.export.save(program, path, report),
        "AOTInductor": lambda path: sparseattn.export.aoti(program, path, report),
        "ONNX": lambda path: sparseattn.export.onnx(program, path, report, input_names=INPUTS),
    }
    print(f"{'format':<14}{'MiB':>7}{'make s':>9}{'load s':>9}{'run ms':>9}{'error':>10}")
    shipped = []
    for name in formats:
        path = folder / FORMATS[name]
        start = time.perf_counter()
        makers[name](path)
        made = time.perf_counter() - start
        loaded = in_fresh_process(name, folder)
        error = float(np.linalg.norm(loaded.output - wanted) / np.linalg.norm(wanted))
        size = path.stat().st_size / 2**20
        print(
            f"{name:<14}{size:>7.1f}{made:>9.1f}{loaded.load:>9.1f}{loaded.run * 1e3:>9.0f}{error:>10.1e}", flush=True
        )
        if error > _TOLERANCE[name]:
            raise SystemExit(f"{name}: the error must be at most {_TOLERANCE[name]:g}")
        shipped.append(Shipped(name, size, made, loaded.load, loaded.run, error))
    return shipped


def main(arguments: Sequence[str] | None = None) -> list[Shipped]:
    """Export, or be the process that loads; what was shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=8, help="256 tokens each")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--child", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where to keep the files (default: nowhere)")
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child, options.folder)
        return []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        return ship(options.frames, options.formats, folder)


if __name__ == "__main__":
    main()
