"""Find `sparseattn`: the installed package, or this source tree where nothing is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def find_sparseattn() -> None:
    """Make `import sparseattn` work: the repository root is the package."""
    if importlib.util.find_spec("sparseattn") is not None:
        return
    spec = importlib.util.spec_from_file_location(
        "sparseattn", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["sparseattn"] = package
    spec.loader.exec_module(package)
