from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["SPARSEATTN_TUNED_TILES"] = "0"  # the tables are tested, whatever was tuned on this machine


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "random calls of the native CPU kernel under the sanitizers (default: 60), of the quantized a fifth as many"
    parser.addoption("--sanitized-calls", type=int, default=60, metavar="N", help=what)
    parser.addoption("--all-sharded-models", action="store_true", help="context parallelism of every video model")


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """The same numbers in every order of the tests, and no compiled graph of another test."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same in all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
