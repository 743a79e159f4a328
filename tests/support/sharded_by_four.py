"""What four ranks do: steps of training, their memory, a few methods, and hybrids."""

from support import sharded_training
from support.sharded_cases import FEW
from support.sharded_rings import HYBRIDS

CASES = {**sharded_training.CASES, **FEW, **HYBRIDS}
