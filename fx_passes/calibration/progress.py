"""A progress bar with the time left, where tqdm is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def shown(total: int, what: str, wanted: bool) -> Iterator[Callable[[int], object]]:
    """Give a function that moves the bar on by so many of `total`."""
    if not wanted or importlib.util.find_spec("tqdm") is None:
        yield lambda _count: None
        return
    with importlib.import_module("tqdm").tqdm(total=total, desc=what) as bar:
        yield bar.update
