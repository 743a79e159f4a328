"""The package as a whole: its list of packages, its floors, its ops."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib
import torch

import sparseattn
from sparseattn.attn_ops.op import same_defaults

ROOT = Path(__file__).parent.parent
FLOORS = ("attn_ops", "nn", "lowering", "fx_passes")


def test_the_package_list_equals_the_tree() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(["sparseattn", *file.parent.relative_to(ROOT).parts])
        for f in FLOORS
        for file in (ROOT / f).rglob("*.py")
    }
    assert listed == found | {"sparseattn"}


def test_the_root_holds_no_other_module() -> None:
    assert [file.name for file in ROOT.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("name", [spec.op for spec in sparseattn.backends().values()])
def test_kernels_repeat_the_defaults_of_their_schema(name: str) -> None:
    spec = next(spec for spec in sparseattn.backends().values() if spec.op == name)
    import importlib

    module = importlib.import_module(f"sparseattn.attn_ops.backends.{spec.name}")
    op = getattr(torch.ops.sparseattn, name).default
    for function in (module._forward, module._check, getattr(module, name)):
        assert same_defaults(op, function) == []


def test_params_of_a_backend_are_arguments_of_its_op() -> None:
    for spec in sparseattn.backends().values():
        arguments = {a.name: a for a in getattr(torch.ops.sparseattn, spec.op).default._schema.arguments}
        for param in spec.params:
            default = arguments[param.name].default_value
            assert (tuple(default) if isinstance(default, list) else default) == param.default, (spec.name, param.name)


def test_public_names() -> None:
    for name in sparseattn.__all__:
        assert getattr(sparseattn, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = sparseattn.nothing_of_this_name
