"""Tables, pictures and figures of README and docs, each a function of the newest rows."""

from . import accuracy, cpu, examples, gpu, pictures, prologue, sharded, simulation
from .registry import PICTURES, VIEWS, NotMeasuredError, Results

__all__ = [
    "PICTURES",
    "VIEWS",
    "NotMeasuredError",
    "Results",
    "accuracy",
    "cpu",
    "examples",
    "gpu",
    "pictures",
    "prologue",
    "sharded",
    "simulation",
]
