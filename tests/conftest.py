from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "random calls of the native CPU kernel under the sanitizers (default: 60)"
    parser.addoption("--sanitized-calls", type=int, default=60, metavar="N", help=what)
    parser.addoption("--all-sharded-models", action="store_true", help="context parallelism of every video model")


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """The same numbers in every order of the tests, and no compiled graph of another test."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
