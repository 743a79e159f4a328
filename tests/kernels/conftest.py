from __future__ import annotations

from importlib.util import find_spec

# Triton is an optional package, with wheels for Linux only.
collect_ignore_glob = [] if find_spec("triton") else ["test_gluon_*.py", "test_triton_*.py"]
