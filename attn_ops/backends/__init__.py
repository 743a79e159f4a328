"""One file per backend: its op, its spec with every requirement, its providers. Adding a backend is adding a file."""

import sys

from ..registry import register_package

register_package(sys.modules[__name__])
