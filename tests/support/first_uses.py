"""Processes that need the native CPU kernel at the same moment: `python first_uses.py PROCESSES`.

They are forked from one that has imported torch and has not touched the kernel. Each that gets a result prints what
served it and the result, on one line.
"""

from __future__ import annotations

import argparse
import fcntl
import os
from typing import Any, NoReturn

import torch

from sparseattn.attn_ops.kernels.cpu.native import library


def _attend() -> str:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
    index, count = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32), torch.tensor([[[2, 1]]], dtype=torch.int32)
    out, lse = torch.ops.sparseattn.block_sparse_attention(q, k, v, index, count, block_q=64, block_k=64)
    return f"{library.detail()} | {out.double().sum():.4f} {lse.double().sum():.4f}"


def _fork(start: int, go: int) -> int:
    child = os.fork()
    if child == 0:
        os.close(go)
        _use(start)
    return child


def _use(start: int) -> NoReturn:
    status = 1
    try:
        os.read(start, 1)  # until the parent, the last that could write, closes it
        os.write(1, f"{_attend()}\n".encode())
        status = 0
    finally:
        os._exit(status)


def _no_locks(*_: Any) -> NoReturn:
    raise OSError("No locks available")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", type=int)
    parser.add_argument("--no-locks", action="store_true", help="as on a file system without them")
    options = parser.parse_args()
    if options.no_locks:
        fcntl.flock = _no_locks
    start, go = os.pipe()
    children = [_fork(start, go) for _ in range(options.processes)]
    os.close(go)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
