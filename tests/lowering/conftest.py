import dataclasses
from collections.abc import Iterator

import pytest
from support.made_up_backends import BLOCKS, MADE_UP, PLAIN, QUANT

from sparseattn.attn_ops import registry
from sparseattn.lowering import presets


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry holds the made-up backends and nothing else."""
    registry.backends()
    monkeypatch.setattr(registry, "_backends", dict(MADE_UP))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's own switches must not reach a test."""
    for name in ("SPARSEATTN_POLICY", "SPARSEATTN_DISABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Made-up backends under the names that the presets use."""
    names = {"flash": PLAIN, "sage": QUANT, "block_topk": BLOCKS}
    registry.backends()
    stand_ins = {name: dataclasses.replace(spec, name=name) for name, spec in names.items()}
    monkeypatch.setattr(registry, "_backends", stand_ins)
    presets.preset.cache_clear()
    yield
    presets.preset.cache_clear()
