"""Random calls of the native CPU kernels of this process, against the definitions: `python native_property.py KIND N`.

For kernels with sanitizers. Every call is printed before it is made: the last line is the call that ended the process.
When all agree, a call reads past its values on purpose; it shows that the sanitizer is there.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from hypothesis import given
from support.native_cases import Case, cases, repeatable
from support.native_check import check_case
from support.quantized_cases import check_quantized, check_rounding, check_selection

from sparseattn.attn_ops.kernels.cpu.native import block_sparse as native
from sparseattn.attn_ops.kernels.cpu.native.library import kernel

KINDS = {"block_sparse": (check_case,), "quantized": (check_quantized, check_rounding, check_selection)}
STRAY = "a stray access"


def main(kind: str, examples: int) -> None:
    library, detail = kernel()
    assert library is not None, detail

    @repeatable(examples)
    @given(cases())
    def agrees(case: Case) -> None:
        _say(str(case))
        for check in KINDS[kind]:
            check(library, case)

    agrees()
    _say(STRAY)
    _stray(library)


def _stray(library: ctypes.CDLL) -> None:
    q, index = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    lists = index, torch.ones(1, 1, 1, dtype=torch.int32), None
    native.attention(library, q, q, q[:, :, 1:].clone(), *lists, block_q=64, block_k=64, causal=False, scale=1.0)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
