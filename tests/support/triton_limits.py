"""What the Triton kernels need of a GPU, as a table, compared with the committed one.

The numbers are those of one release of Triton: kernel, GPU, sizes -> registers, spills, shared memory, programs that a
multiprocessor holds, tensor core instructions. `python tests/support/triton_limits.py` compares all of it, about
two minutes on one core; with `--write` it becomes the committed table. CI compares `CHECKED`.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.triton_aot import ARCHS, CompiledKernel, gpu
from support.triton_launches import (
    launch_block_sparse,
    launch_block_sparse_backward,
    launch_coarse,
    launch_fused_backward,
    launch_linear_branch,
    launch_rounding,
    launch_sage,
    launch_sparge,
)

TABLE = Path(__file__).parents[1] / "kernels" / "triton_limits.json"
BF16 = torch.bfloat16
Launch = Callable[[], None]
Needs = dict[str, Any]
LOWER_IS_BETTER = ("registers", "spilled", "shared")


def _cases() -> dict[str, tuple[int, Launch]]:
    """Name -> GPU and launch."""
    cases: dict[str, tuple[int, Launch]] = {}
    for arch, dim in ((90, 64), *((arch, 128) for arch in ARCHS)):
        pvs, tail = ("fp16", "fp8") if arch >= 89 else ("fp16",), f"sm{arch} D{dim}"
        launches: dict[str, Launch] = {
            "block_sparse": functools.partial(launch_block_sparse, BF16, dim, 64, False),
            "block_sparse causal": functools.partial(launch_block_sparse, BF16, dim, 64, True),
            "block_sparse_backward causal": functools.partial(launch_block_sparse_backward, BF16, dim, (64, 64), True),
            "coarse": functools.partial(launch_coarse, dim),
            "linear_branch": functools.partial(launch_linear_branch, BF16, dim),
            "quantize": functools.partial(launch_rounding, BF16, dim, pvs[-1], False),
        }
        if arch in (90, 100):
            copied = functools.partial(launch_block_sparse, BF16, dim, 64, descriptors=True)
            launches["block_sparse descriptors"] = functools.partial(copied, False)
            launches["block_sparse descriptors causal"] = functools.partial(copied, True)
        if arch == 90:
            launches["block_sparse_fused_backward causal"] = functools.partial(launch_fused_backward, dim, 64, True)
        for pv in pvs:
            launches[f"sage {pv}"] = functools.partial(launch_sage, BF16, dim, pv, False)
            launches[f"sparge {pv}"] = functools.partial(launch_sparge, BF16, dim, pv, False)
        cases |= {f"{tail} {name}": (arch, launch) for name, launch in launches.items()}
    return cases


CASES = _cases()
CHECKED = [name for name in CASES if name.startswith("sm90 D128") or name.endswith(("sage fp8", " block_sparse"))]
"""Those that a test compares: the others are compiled by other tests, which look at spills and shared memory alone."""


def needs(name: str) -> dict[str, Needs]:
    """Kernel and its number among those of its name -> what it needs."""
    arch, launch = CASES[name]
    with gpu(arch) as kernels:
        launch()
    seen: Counter[str] = Counter()
    found: dict[str, Needs] = {}
    for kernel in kernels:
        seen[kernel.name] += 1
        found[f"{kernel.name} {seen[kernel.name]}"] = _needs_of(kernel)
    return found


def _needs_of(kernel: CompiledKernel) -> Needs:
    return {
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "shared": kernel.shared,
        "programs_per_sm": kernel.programs_per_sm,
        "matrix": kernel.matrix_instructions,
    }


def committed() -> tuple[str, dict[str, dict[str, Needs]]]:
    """The release of Triton that the table is of, and the table."""
    table = json.loads(TABLE.read_text())
    return table["triton"], table["kernels"]


def differences(name: str, got: dict[str, Needs], limits: dict[str, Needs]) -> list[str]:
    """Sentences, one for each number that is not the committed one."""
    if got.keys() != limits.keys():
        return [f"{name}: compiles {sorted(got)}, the table has {sorted(limits)}"]
    return [
        f"{name}: {kernel} has {what} {got[kernel][what]}, {_verdict(what, got[kernel][what], limit)} than {limit}"
        for kernel, of_kernel in limits.items()
        for what, limit in of_kernel.items()
        if got[kernel][what] != limit
    ]


def _verdict(what: str, got: Any, limit: Any) -> str:
    if isinstance(limit, dict):
        return "other"
    return "better (tighten the table)" if (got < limit) == (what in LOWER_IS_BETTER) else "worse"


def main() -> int:
    """Compare or write the whole table."""
    table = {name: needs(name) for name in CASES}
    if "--write" in sys.argv[1:]:
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table))
        TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')
        return 0
    limits = committed()[1]
    found = [line for name, got in table.items() for line in differences(name, got, limits.get(name, {}))]
    sys.stdout.write("\n".join([*found, f"{len(table)} cases, {len(found)} differences\n"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
