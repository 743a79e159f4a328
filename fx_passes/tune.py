"""tune: measure a few tiles of every Triton kernel on the GPU that is here, and keep the fastest for all later runs.

Nothing else measures, or writes the file in which they are kept: results change with a tile only where this is called.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..attn_ops.call import dtype_name
from ..attn_ops.errors import ArgumentError, MissingPackageError, SparseAttnError, UnsupportedError
from ..attn_ops.kernels.cache_folder import cache_folders, writable
from .calibration.progress import shown
from .table import aligned

if TYPE_CHECKING:
    from ..attn_ops.kernels.triton.contest import Clock, Outcome
    from ..attn_ops.kernels.triton.tile import Tile
    from ..attn_ops.kernels.triton.tuned_file import Gpu

_LEAST_ARCH = 80
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_CHANNELS = 256
_COLUMNS = ("kernel", "of", "table's tile", "ms", "best tile", "ms", "ratio", "not measured")


@dataclass(frozen=True)
class Tuning:
    """What `tune` measured or found measured; printed, a table with tiles as queries x keys, warps and stages."""

    file: Path
    outcomes: tuple[Outcome, ...]

    def __str__(self) -> str:
        rows = [_COLUMNS, *map(_cells, self.outcomes)]
        return "\n".join([*aligned(rows), f"{len(self.outcomes)} tiles in {self.file}"])


def tune(
    *,
    kernels: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    head_dims: Sequence[int] = (64, 128),
    blocks: Sequence[tuple[int, int]] = ((64, 64), (128, 64)),
    device: torch.device | str = "cuda",
    force: bool = False,
    progress: bool = True,
    clock: Clock | None = None,
) -> Tuning:
    """Choose tiles of the Triton kernels by measurement, on this GPU, for this process and all later ones.

        print(sparseattn.tune(head_dims=[128]))

    For every kernel, size of a dtype's elements, power of two that holds head_dim, and blocks, two to six tiles are
    compiled: that of the table, and those next to it. One whose results on small inputs are off is left out. The others
    take turns on 8,192 tokens of 16 heads, a quarter of the blocks, with and without masks; a tile that is at least
    3 % faster than the table's takes its place, for sequences of every length. With another tile a result is another in
    its last bits.

    Args:
        kernels: "block_sparse", "block_sparse_grad_q", "block_sparse_grad_kv", "sage" or "sparge"; None: all of them.
            A gradient's time is that of the whole backward pass.
        dtypes: fp32, fp16 or bf16; the last two share their tiles, and those of "sage" and "sparge" are for all three.
        head_dims: channels, up to 256.
        blocks: tokens of a block of queries and of keys; "sage" has none.
        device: the GPU, sm_80 or newer. Others of the same name share its file.
        force: measure again what the file has.
        progress: show a progress bar, where tqdm is installed.
        clock: measures one call in ms; None: CUDA events, on a cache that has just been overwritten.

    Returns:
        One row for every tile that was asked for, and the file. It is written after every row.

    Raises:
        ArgumentError: for a kernel, dtype, head_dim or block that there is not.
        UnsupportedError: without such a GPU.
        MissingPackageError: without Triton.
        SparseAttnError: if no folder can be written to.
    """
    with _triton():
        from ..attn_ops.kernels.triton import contest, tuned_file
        from ..attn_ops.kernels.triton.tuned_tiles import tuned_tiles
        from ..attn_ops.kernels.triton.workloads import KERNELS, Sizes, workloads
    _check(KERNELS, kernels=kernels, dtypes=dtypes, head_dims=head_dims, blocks=blocks)
    gpu = gpu_at(torch.device(device))
    with _written():
        writable(cache_folders())
    sizes = [Sizes(*of, device) for of in itertools.product(dtypes, head_dims, blocks)]
    asked = {
        (workload.choice.kernel, workload.key): workload
        for kernel, of in itertools.product(kernels or KERNELS, sizes)
        for workload in workloads(kernel, of, gpu.arch)
    }
    known = {} if force else tuned_file.known(gpu)
    clock = clock or contest.CudaClock(torch.device(device))
    outcomes = []
    with shown(len(asked), "tune", progress) as forward:
        for name, workload in asked.items():
            if name in known:
                outcomes.append(contest.Outcome(workload.choice, workload.key, known[name], {}))
            else:
                outcomes.append(contest.contest(workload, clock))
                with _written():
                    tuned_file.add(gpu, {name: outcomes[-1].measured})
                tuned_tiles.cache_clear()
            forward(1)
    file = tuned_file.find(gpu)
    assert file is not None
    return Tuning(file, tuple(outcomes))


def gpu_at(device: torch.device) -> Gpu:
    """The GPU to tune.

    Raises:
        UnsupportedError: if the device is none that the kernels are for.
    """
    from ..attn_ops.kernels.triton.tuned_file import Gpu

    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnsupportedError(f"tune: device must be a GPU of CUDA that is here, got {device}. Tune where it is.")
    gpu = Gpu.at(device)
    if gpu.arch < _LEAST_ARCH:
        raise UnsupportedError(f"tune: the Triton kernels need sm_{_LEAST_ARCH} or newer, got sm_{gpu.arch}.")
    return gpu


def _check(known: Sequence[str], **asked: Sequence[Any] | None) -> None:
    allowed: dict[str, tuple[Callable[[Any], bool], str]] = {
        "kernels": (known.__contains__, f"name kernels. Known: {', '.join(known)}"),
        "dtypes": (_DTYPES.__contains__, f"be of {', '.join(map(dtype_name, _DTYPES))}"),
        "head_dims": (range(1, _MOST_CHANNELS + 1).__contains__, f"be numbers from 1 to {_MOST_CHANNELS}"),
        "blocks": (lambda pair: len(pair) == 2 and min(pair) >= 1, "be pairs of numbers from 1 on"),
    }
    for name, values in asked.items():
        is_allowed, must = allowed[name]
        if values is not None and not (values and all(map(is_allowed, values))):
            raise ArgumentError("tune", name, must, values)


@contextlib.contextmanager
def _triton() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"tune: {error.name} is not installed. Run: pip install 'sparseattn[triton]'."
        ) from None


@contextlib.contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SparseAttnError(f"tune: {error}. Set SPARSEATTN_CACHE_DIR to a folder that can be written to.") from error


def _cells(outcome: Outcome) -> tuple[str, ...]:
    choice, (tile, ms, table_ms) = outcome.choice, outcome.measured
    names = list(inspect.signature(choice.table).parameters)
    of = ", ".join(f"{name} {int(value)}" for name, value in zip(names, outcome.key, strict=True) if name != "arch")
    refused = "; ".join(f"{_brief(tile)}: {reason}" for tile, reason in outcome.refused.items())
    times = f"{table_ms:.3f}", _brief(tile), f"{ms:.3f}", f"{table_ms / ms:.2f}"
    return choice.kernel, of, _brief(choice.table(*outcome.key)), *times, refused


def _brief(tile: Tile) -> str:
    return f"{tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}"
