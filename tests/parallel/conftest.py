from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run


@pytest.fixture(scope="session")
def launched(run_folder: Path) -> Callable[..., dict[str, list[Any]]]:
    """`run`, once for every test and worker that asks for the same: the others read what the first has written."""

    def launch(module: str, ranks: int, cases: str = "CASES") -> dict[str, list[Any]]:
        import fcntl

        with open(run_folder / f"{module}-{cases}-{ranks}.json", "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if not (text := file.read()):
                text = json.dumps(run(module, ranks, cases))
                file.write(text)
        found: dict[str, list[Any]] = json.loads(text)
        return found

    return launch
