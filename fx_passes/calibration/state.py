"""State: what a calibration has measured so far, in a file, so that one that was interrupted goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...attn_ops.capability import Capability
from ...attn_ops.errors import PolicyError
from .candidates import Candidate
from .ledger import Ledger
from .samples import Samples

VERSION = 2
T = TypeVar("T")


class State:
    """What was measured.

    Those are the sums, the outputs with dense attention of the samples that were measured, the number of those whose
    errors were followed to the output, and the machine.

    Args:
        path: the file, or None to keep everything in memory.
        header: what the calibration is of: a file with another is refused.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self._path, self._header = path, header
        self.ledger = Ledger()
        self.dense: list[list[Tensor]] = []
        self.weighed = 0
        self.machine: str | None = None

    @classmethod
    def open(
        cls,
        path: str | Path | None,
        samples: Samples,
        candidates: Sequence[Candidate],
        *,
        model: str,
        values: str,
        objective: str,
        machine: Capability | None,
        weigh: str,
    ) -> State:
        """The state in a file, or a new one.

        Raises:
            PolicyError: if the file is not a state, or is of another calibration. It is left as it is.
        """
        header = {
            "version": VERSION,
            "model": model,
            "objective": objective,
            "machine": None if machine is None else str(machine),
            "weigh": weigh,
            "samples": len(samples),
            "buckets": [list(one) for one in samples.buckets or ()],
            "candidates": [str(one.rule) for one in candidates],
            "values": values,
        }
        state = cls(None if path is None else Path(path), header)
        if state._path is not None and state._path.exists():
            state._read(state._path)
        return state

    def _read(self, path: Path) -> None:
        kept = _parsed(path, lambda: torch.load(path, weights_only=True))
        header = _parsed(path, lambda: dict(kept["header"]))
        if wrong := [name for name in self._header if header.get(name) != self._header[name]]:
            raise PolicyError(
                f"calibrate: {path} is of another calibration: {', '.join(wrong)} differ. Delete it, or name another."
            )
        self.ledger = _parsed(path, lambda: Ledger.from_json(kept["ledger"]))
        self.dense, self.weighed, self.machine = _parsed(
            path, lambda: (kept["dense"], kept["weighed"], kept["machine"])
        )

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        part = self._path.with_name(f"{self._path.name}.part")
        kept = {
            "header": self._header,
            "ledger": self.ledger.to_json(),
            "dense": self.dense,
            "weighed": self.weighed,
            "machine": self.machine,
        }
        torch.save(kept, part)
        os.replace(part, self._path)


def _parsed(path: Path, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except Exception as error:  # whatever a file may hold
        raise PolicyError(
            f"calibrate: {path} is not the state of a calibration ({type(error).__name__}). Delete it, or name another."
        ) from None
