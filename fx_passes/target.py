"""Models named on the command line: FILE.py:NAME or package.module:NAME, a function that returns one with inputs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..attn_ops.errors import SparseAttnError
from .calibration.samples import Sample

TARGET = "FILE.py:NAME or package.module:NAME; NAME() returns (model, inputs)"

_OURS = tuple(str(Path(__file__).parents[1] / floor) for floor in ("attn_ops", "nn", "lowering", "fx_passes"))
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_NOT_THEIRS = ("<", *_OURS, *_INSTALLED)
"""How the files begin that a user has not written."""


def load_target(verb: str, target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model that a function named by `target` returns, and the inputs of one call of it: the first, of samples.

    Args:
        verb: what the user asked for, to begin an error with.
        target: FILE.py:NAME or package.module:NAME.

    Returns:
        The model, its positional and its keyword inputs.

    Raises:
        SparseAttnError: if there is no such function, it fails, or it does not return (model, inputs).
    """
    model, samples = load_samples(verb, target)
    return model, tuple(samples[0].args), dict(samples[0].kwargs)


def load_samples(verb: str, target: str) -> tuple[Callable[..., Any], list[Sample]]:
    """The model that a function named by `target` returns, and all samples.

    A tuple or a dict is the inputs of one call, a list is samples, each a tuple, a dict or a Sample; so that nothing
    can be taken for the other.

    Args:
        verb: what the user asked for, to begin an error with.
        target: FILE.py:NAME or package.module:NAME.

    Raises:
        SparseAttnError: if there is no such function, it fails, or it does not return (model, inputs), or no sample.
    """
    built = _call(verb, target)
    if not isinstance(built, tuple) or len(built) != 2 or not isinstance(built[1], tuple | list | dict):
        raise SparseAttnError(
            f"{verb}: {target} must be a function that returns (model, inputs), the inputs as a tuple or a dict, or as "
            "a list of several."
        )
    model, inputs = built
    given = inputs if isinstance(inputs, list) else [inputs]
    if not given:
        raise SparseAttnError(f"{verb}: {target} returns no samples. Give at least one tuple of the model's inputs.")
    if odd := [sample for sample in given if not isinstance(sample, tuple | dict | Sample)]:
        raise SparseAttnError(
            f"{verb}: {target} returns a list, which is one of samples, each a tuple, a dict or a Sample, got "
            f"{type(odd[0]).__name__}. The inputs of one call are a tuple."
        )
    return model, [Sample.of(sample) for sample in given]


def _call(verb: str, target: str) -> object:
    """What the function that `target` names returns."""
    place, _, name = target.rpartition(":")
    if not place:
        raise SparseAttnError(f"{verb}: target must be FILE.py:NAME or package.module:NAME, got {target!r}.")
    if place.endswith(".py") and not Path(place).exists():
        raise SparseAttnError(f"{verb}: there is no file {place}.")
    with on_one_line(f"{verb}: {target}"):
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        build = getattr(module, name, None)
        built: object = build() if callable(build) else None
    if built is None:
        raise SparseAttnError(f"{verb}: {place} has no {name!r}. It must be a function that returns (model, inputs).")
    return built


def _load_file(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def on_one_line(where: str) -> Iterator[None]:
    """What the user's code raises as an error of one line: what, and in which line of theirs. Our own pass through.

    Raises:
        SparseAttnError: for any exception inside.
    """
    try:
        yield
    except SparseAttnError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f"{frame.filename}:{frame.lineno}" for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
        said = str(error).strip().partition("\n")[0]
        line = f" ({theirs[-1]})" if theirs else ""
        raise SparseAttnError(f"{where}: {type(error).__name__}: {said}{line}") from error
