"""Random calls of the quantized and selecting kernels of this process: `python quantized_property.py EXAMPLES`.

For a kernel with sanitizers. Every call is printed before it is made; the last line is "done".
"""

from __future__ import annotations

import sys

from hypothesis import given
from support.native_cases import Case, cases, repeatable
from support.quantized_cases import check_quantized, check_rounding, check_selection

from sparseattn.attn_ops.kernels.cpu.native.library import kernel

DONE = "done"


def main(examples: int) -> None:
    library, detail = kernel()
    assert library is not None, detail

    @repeatable(examples)
    @given(cases())
    def agrees(case: Case) -> None:
        _say(str(case))
        check_quantized(library, case)
        check_rounding(library, case)
        check_selection(library, case)

    agrees()
    _say(DONE)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
