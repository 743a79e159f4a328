"""For packages whose kernels launch on CUDA's default stream, whatever stream is current, and set the current device.

On another stream they would run unordered with it, and under CUDA-graph capture they would not be recorded: both give
wrong results without an error, so both are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .known_bad import at_run_time


@contextmanager
def on_default_stream(package: str, q: Tensor) -> Iterator[None]:
    """Run the package's call on q's device, and restore the current device.

    Raises:
        UnsupportedError: if the current stream is not the default stream (as in a CUDA-graph capture).
    """
    if q.is_cuda and torch.cuda.current_stream(q.device) != torch.cuda.default_stream(q.device):
        reports = "".join(f" Known: {report}." for report in at_run_time(package))
        raise UnsupportedError(
            f"{package}: its kernels run on CUDA's default stream only, and another one is current (a side stream, or "
            f'a CUDA-graph capture). Use provider="triton", or a compile mode without CUDA graphs.{reports}'
        )
    with torch.cuda.device_of(q):
        yield
