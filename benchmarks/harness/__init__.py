"""What the suites share: records, clocks, errors, rates, inputs, pages. Importing it makes `sparseattn` importable."""

from .source_tree import find_sparseattn

find_sparseattn()
