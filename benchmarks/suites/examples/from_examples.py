"""The scripts of examples/ as modules, to measure what they do."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from harness.source_tree import ROOT

EXAMPLES = ROOT / "examples"
_FOLDERS = (EXAMPLES, EXAMPLES / "tiny_video")


def imported(name: str) -> ModuleType:
    """The script of that name; it finds its neighbours by theirs."""
    for folder in map(str, _FOLDERS):
        if folder not in sys.path:
            sys.path.append(folder)
    return importlib.import_module(name)


def why_not(*packages: str) -> str:
    """What the tiny video model, and an example that needs these packages too, lacks here."""
    needed = ("diffusers", "safetensors", *packages)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}: pip install {' '.join(missing)}" if missing else ""
