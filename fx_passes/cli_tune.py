"""The command line's `sparseattn tune`: tiles of the Triton kernels, measured on the GPU that is here."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

import torch

from ..attn_ops.errors import SparseAttnError
from .target import on_one_line

if TYPE_CHECKING:
    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG = """\
Of every kernel and size a few tiles are compiled, compared and timed. The
fastest go to a file in the cache folder, which later runs read; nothing else
measures or writes it. Results change in their last bits with a tile.

What the file has is not measured again, so Ctrl-C loses one row at most.
SPARSEATTN_TUNED_TILES=0 runs without the file; deleting it undoes the tuning.
"""


def add_tune(verbs: _Verbs) -> None:
    """Add the verb `tune` to the command line."""
    verb = verbs.add_parser(
        "tune",
        help="choose tiles of the Triton kernels by measurement, on this GPU",
        description="Choose tiles of the Triton kernels by measurement, on this GPU, for all later runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--kernels", metavar="NAMES", help="comma-separated, such as block_sparse,sage (default: all)")
    verb.add_argument("--dtypes", default="bfloat16", metavar="NAMES", help="comma-separated (default: %(default)s)")
    verb.add_argument("--head-dims", default="64,128", metavar="NUMBERS", help="(default: %(default)s)")
    verb.add_argument(
        "--blocks", default="64x64,128x64", metavar="PAIRS", help="tokens of queries x keys (default: %(default)s)"
    )
    verb.add_argument("--device", default="cuda", help="the GPU (default: %(default)s)")
    verb.add_argument("--force", action="store_true", help="measure again what the file has")
    verb.set_defaults(command=_tune)


def _tune(options: argparse.Namespace) -> str:
    from .tune import tune

    with on_one_line("tune"):
        tuning = tune(
            kernels=options.kernels.split(",") if options.kernels else None,
            dtypes=[getattr(torch, name, name) for name in options.dtypes.split(",")],
            head_dims=[number for (number,) in _numbers("--head-dims", options.head_dims, 1)],
            blocks=[(block_q, block_k) for block_q, block_k in _numbers("--blocks", options.blocks, 2)],
            device=options.device,
            force=options.force,
        )
    return str(tuning)


def _numbers(flag: str, text: str, count: int) -> list[list[int]]:
    """Words between commas, of so many numbers each, with an x between."""
    words = text.split(",")
    if not all(re.fullmatch(r"x".join([r"\s*\d+\s*"] * count), word) for word in words):
        raise SparseAttnError(f"tune: {flag} must be like {','.join(['x'.join(['64'] * count)] * 2)}, got {text!r}.")
    return [list(map(int, word.split("x"))) for word in words]
