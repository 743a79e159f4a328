"""Models nobody here wrote, exported and rewritten: equal to the model that backend="sparseattn" compiles."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.graphs import fresh_dynamo  # noqa: F401  (autouse)
from support.processes import run
from support.zoo import ZOO, Entry, build
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sparseattn
from sparseattn import Policy, Report, Rule, export
from sparseattn.fx_passes.export.contents import op_calls

pytest.importorskip("diffusers", reason="the zoo needs diffusers and transformers")
pytest.importorskip("transformers", reason="the zoo needs diffusers and transformers")
pytestmark = pytest.mark.models

POLICY = Policy(
    [Rule("block_topk", kind="self", params={"keep_ratio": 0.5, "block_q": 16, "block_k": 16}), Rule("flash")]
)
QUICK = {"cpp_cache_precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
FOUR = [entry for entry in ZOO if entry.name in ("wan", "flux", "sd3", "llama")]


class Logits(torch.nn.Module):
    """A language model that returns a tensor: a class of transformers could not be made without transformers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def built(entry: Entry) -> tuple[torch.nn.Module, dict[str, Any]]:
    model, inputs = build(entry)
    return (Logits(model), {"input_ids": inputs["input_ids"]}) if entry.name == "llama" else (model, inputs)


def first(outputs: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))


def compiled(model: torch.nn.Module) -> Any:
    return torch.compile(model, backend="sparseattn", options={"policy": POLICY, "inner_backend": "aot_eager"})


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Report], dict[str, Tensor]]:
    """What `rewrite` reports of the four models, and what one fresh process computes with their files."""
    folder, reports, given = tmp_path_factory.mktemp("programs"), {}, {}
    for entry in FOUR:
        model, given[entry.name] = built(entry)
        with torch.no_grad():
            program = torch.export.export(model, (), given[entry.name])
        program, reports[entry.name] = sparseattn.rewrite(program, POLICY)
        export.save(program, folder / f"{entry.name}.pt2", reports[entry.name])
    torch.save(given, folder / "inputs.pt")
    run(
        "import sys, torch, sparseattn\n"
        "outputs, folder = {}, sys.argv[1]\n"
        "for name, given in torch.load(f'{folder}/inputs.pt').items():\n"
        "    program, report = sparseattn.export.load(f'{folder}/{name}.pt2')\n"
        "    result = program.module()(**given)\n"
        "    outputs[name] = result[0] if isinstance(result, tuple) else result\n"
        "torch.save(outputs, f'{folder}/outputs.pt')\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)",
        folder,
    )
    programs = {entry.name: export.load(folder / f"{entry.name}.pt2")[0] for entry in FOUR}
    for name, program in programs.items():
        assert Counter(call.op for call in op_calls(program)) == _ops_of(reports[name])
    return reports, torch.load(folder / "outputs.pt")


def _ops_of(report: Report) -> Counter[str]:
    return Counter(decision.op for decision in report.decisions if not decision.is_dense)


@pytest.mark.parametrize("entry", FOUR, ids=lambda entry: entry.name)
@torch.no_grad()
def test_equals_the_compiled_model(entry: Entry, reloaded: tuple[dict[str, Report], dict[str, Tensor]]) -> None:
    reports, outputs = reloaded
    model, inputs = built(entry)
    expected = first(compiled(model)(**inputs))
    assert reports[entry.name].rewritten == entry.rewritten
    torch.testing.assert_close(outputs[entry.name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", FOUR, ids=lambda entry: entry.name)
@torch.no_grad()
def test_decompositions_change_nothing(entry: Entry, reloaded: tuple[dict[str, Report], dict[str, Tensor]]) -> None:
    model, inputs = built(entry)
    result, report = sparseattn.rewrite(torch.export.export(model, (), inputs).run_decompositions(), POLICY)
    assert report.chosen == reloaded[0][entry.name].chosen
    torch.testing.assert_close(first(result.module()(**inputs)), reloaded[1][entry.name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_compiled_package_at_three_lengths(tmp_path: Path) -> None:
    """Llama, whose mask the rewrite proves to be causal, in a process that does not import transformers."""
    model, inputs = built(next(entry for entry in FOUR if entry.name == "llama"))
    program = torch.export.export(model, (inputs["input_ids"],), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    result, report = sparseattn.rewrite(program, POLICY)
    assert report.chosen == {"block_topk": 2}
    assert all(row.call.causal and "seq_q" in row.call.dynamic for row in report.rows)
    path = export.aoti(result, tmp_path / "llama.pt2", report, inductor_configs=QUICK)
    given = {length: torch.randint(1, 90, (2, length)) for length in (16, 33, 64)}
    torch.save(given, tmp_path / "inputs.pt")
    run(
        "import sys, torch, sparseattn\n"
        "run, given = torch._inductor.aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])\n"
        "torch.save({length: run(ids) for length, ids in given.items()}, sys.argv[3])\n"
        "assert 'transformers' not in sys.modules",
        path,
        *(tmp_path / name for name in ("inputs.pt", "outputs.pt")),
    )
    for length, output in torch.load(tmp_path / "outputs.pt").items():
        torch.testing.assert_close(output, compiled(model)(given[length]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", [entry for entry in FOUR if entry.name != "llama"], ids=lambda entry: entry.name)
@torch.no_grad()
def test_a_compiled_package(entry: Entry, tmp_path: Path) -> None:
    """In a process that does not import diffusers."""
    model, inputs = built(entry)
    program, report = sparseattn.rewrite(torch.export.export(model, (), inputs), POLICY)
    path = export.aoti(program, tmp_path / "model.pt2", report, inductor_configs=QUICK)
    torch.save(inputs, tmp_path / "inputs.pt")
    run(
        "import sys, torch, sparseattn\n"
        "result = torch._inductor.aoti_load_package(sys.argv[1])(**torch.load(sys.argv[2]))\n"
        "torch.save(result[0] if isinstance(result, tuple | list) else result, sys.argv[3])\n"
        "assert 'diffusers' not in sys.modules",
        path,
        *(tmp_path / name for name in ("inputs.pt", "output.pt")),
    )
    expected = first(compiled(model)(**inputs))
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected, rtol=1e-5, atol=1e-5)
