"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import json

import pytest

from sparseattn.fx_passes import cli
from sparseattn.fx_passes.cli import main

_SCRIPT = """
import torch
class Model(torch.nn.Module):
    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)
def build():
    return Model(), (torch.randn(1, 2, 64, 16),)
"""


def test_backends_lists_every_provider_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["providers"]
    found = {(row["backend"], row["provider"]): row for row in rows}
    assert found["flash", "torch"]["available"]
    assert "pip install flash-attn" in str(found["flash", "flash_attn"]["why_not"])
    assert main(["backends", "--capability", "sm90"]) == 0
    assert "sm90" in capsys.readouterr().out


def test_explain_reads_a_script(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "model_script.py"
    script.write_text(_SCRIPT)
    assert main(["explain", f"{script}:build", "--policy", "exact", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["decision"]["backend"] == "flash"
    policy = tmp_path / "policy.toml"
    policy.write_text('version = 1\n[[rules]]\nuse = "block_topk"\nmode = "require"\nhead_dim = 16\n')
    policy.write_text('version = 1\n[[rules]]\nuse = "sage"\nmode = "require"\nprovider = "triton"\n')
    assert main(["explain", f"{script}:build", "--policy", str(policy)]) == 1
    assert "triton" in capsys.readouterr().err


def test_wrong_use_is_told(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "nowhere.py:build"]) == 2
    assert "no file" in capsys.readouterr().err
    assert main(["bench", "--shape", "1,2"]) == 2
    assert "B,H,S,D" in capsys.readouterr().err
    assert main(["bench", "--shape", "1,1,64,16", "--backends", "flsh"]) == 2
    assert "flash" in capsys.readouterr().err


def test_an_interruption_is_told_without_a_traceback(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "measure", interrupted)
    assert main(["bench", "--shape", "1,1,64,16"]) == 130
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "interrupted\n")


def test_a_device_that_is_not_there_is_told_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "1,1,64,16", "--device", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench: RuntimeError: ")
    assert err.count("\n") == 1


def test_bench_and_env_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "1,1,256,16", "--backends", "flash", "--repeats", "2", "--csv"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["sdpa", "flash"]
    assert main(["env", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)
