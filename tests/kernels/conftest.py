from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

# Triton is an optional package, with wheels for Linux only.
collect_ignore_glob = [] if find_spec("triton") else ["test_gluon_*.py", "test_triton_*.py"]


@pytest.fixture(scope="session")
def sanitized_cache(run_folder: Path) -> Path:
    """Where the tests of a run keep the kernel with sanitizers: it is built once."""
    return run_folder / "sanitized"
