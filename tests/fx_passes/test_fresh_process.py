"""What only a fresh process can show: lazy loading, an unchanged torch, caches shared between processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_backend_is_listed_without_importing_us() -> None:
    out = _run(
        "import sys, torch\n"
        "print('sparseattn' in torch._dynamo.list_backends(exclude_tags=None), 'sparseattn' in sys.modules)"
    )
    assert out.split() == ["True", "False"]


def test_compiles_in_a_process_that_never_imported_us() -> None:
    out = _run(
        "import torch\n"
        "f = lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "q = torch.randn(1, 2, 32, 16)\n"
        "c = torch.compile(f, backend='sparseattn', options={'policy': 'exact', 'inner_backend': 'aot_eager'})\n"
        "print(torch.allclose(c(q), f(q), atol=1e-5))\n"
        "import sparseattn\n"
        "print(sparseattn.last_report().rewritten)"
    )
    assert out.split() == ["True", "1"]


_BLOCK = """
import importlib.machinery, sys, threading
find = importlib.machinery.PathFinder.find_spec
def absent(name, path=None, target=None):
    return None if name.split('.')[0] in ('triton', 'diffusers', 'transformers', 'numpy') else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(absent)
import torch, torch._dynamo, torch._inductor.config, torch.nn.functional as F
"""


def test_import_needs_torch_alone_and_changes_nothing() -> None:
    out = _run(
        _BLOCK + "import torch._inductor.config as ic, torch._functorch.config as fc, torch._dynamo.config as dc\n"
        "def state():\n"
        "    configs = [c.get_config_copy() for c in (ic, fc, dc)]\n"
        "    return (configs, {k: id(v) for k, v in vars(F).items()}, {k: id(v) for k, v in vars(torch).items()},\n"
        "            torch.is_grad_enabled(), torch.get_num_threads(), threading.active_count())\n"
        "before, modules = state(), set(sys.modules)\n"
        "import sparseattn\n"
        "after, new = state(), set(sys.modules) - modules\n"
        "import os\n"
        "listing = f'/proc/self/task/{os.getpid()}/children'\n"
        "children = open(listing).read() if os.path.exists(listing) else ''\n"
        "print(before == after, sorted(m for m in new if not m.startswith(('sparseattn', 'torch'))), repr(children))\n"
        "q = torch.randn(1, 2, 100, 16)\n"
        "print(torch.ops.sparseattn.block_topk_attention(q, q, q, keep_ratio=0.5)[0].shape == q.shape)"
    )
    first, second = out.strip().splitlines()
    assert first.startswith("True")
    assert first.endswith("''")
    for name in ("triton", "numpy", "diffusers", "transformers"):
        assert f"'{name}" not in first
    assert second == "True"


def test_checks_stay_without_asserts() -> None:
    """Published checks are `assert`, which python -O removes: wrong dtypes and shapes then reach the kernel."""
    out = _run(
        "import torch, sparseattn\n"
        "q = torch.randn(1, 2, 64, 16)\n"
        "for k in (q.half(), q[..., ::2], q[:, :, :, :8], torch.randn(1, 3, 64, 16), q[0]):\n"
        "    try:\n"
        "        torch.ops.sparseattn.sage_attention(q, k, k)\n"
        "    except sparseattn.attn_ops.errors.ArgumentError:\n"
        "        print(__debug__)",
        PYTHONOPTIMIZE="1",
    )
    assert out.split() == ["False"] * 5


_COMPILE = """
import torch, sparseattn, torch._dynamo.utils as u
torch._inductor.config.cpp_cache_precompile_headers = False  # they take longer than two kernels save
torch.manual_seed(0)
f = lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q) * 2
q = torch.randn(1, 2, 256, 16)
with torch.no_grad():
    out = torch.compile(f, backend='sparseattn', options={'policy': POLICY})(q)
hits = u.counters['inductor'].get('fxgraph_cache_hit', 0) + u.counters['aot_autograd'].get('autograd_cache_hit', 0)
print(dict(sparseattn.last_report().chosen), round(out.abs().sum().item(), 3), hits)
"""


def test_processes_that_share_a_cache_folder_never_share_a_stale_graph(tmp_path) -> None:
    sparse = "{'rules': [{'use': 'block_topk', 'params': {'keep_ratio': 0.1, 'block_q': 32, 'block_k': 32}}]}"
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    runs = [
        _run(_COMPILE.replace("POLICY", policy), **environment).strip() for policy in ("'exact'", sparse, "'exact'")
    ]
    exact, topk, again = runs
    assert "flash" in exact
    assert "block_topk" in topk
    assert exact.split("}")[1].split()[0] != topk.split("}")[1].split()[0]
    assert again.split("}")[0] == exact.split("}")[0]
    assert again.split("}")[1].split()[0] == exact.split("}")[1].split()[0]
    assert int(topk.split()[-1]) == 0
    assert int(again.split()[-1]) >= 1  # the cache works: the same policy hits


@pytest.mark.parametrize("variable", ["SPARSEATTN_POLICY", "SPARSEATTN_DISABLE"])
def test_environment_forces_the_policy(variable: str) -> None:
    value = {"SPARSEATTN_POLICY": "exact", "SPARSEATTN_DISABLE": "1"}[variable]
    out = _run(
        "import torch, sparseattn\n"
        "f = lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "q = torch.randn(1, 2, 4096, 16)\n"
        "torch.compile(f, backend='sparseattn', options={'policy': 'fast', 'inner_backend': 'eager'})(q)\n"
        "r = sparseattn.last_report()\n"
        "print(r and r.policy)",
        **{variable: value},
    )
    assert out.strip() == {"SPARSEATTN_POLICY": "exact", "SPARSEATTN_DISABLE": "None"}[variable]


def test_the_report_is_in_the_structured_trace(tmp_path) -> None:
    _run(
        "import torch\n"
        "f = lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "options = {'policy': 'exact', 'inner_backend': 'eager'}\n"
        "torch.compile(f, backend='sparseattn', options=options)(torch.randn(1, 2, 32, 16))",
        TORCH_TRACE=str(tmp_path),
    )
    (log,) = tmp_path.iterdir()
    text = log.read_text()
    assert '"name": "sparseattn_report", "encoding": "json"' in text
    assert '"backend": "flash"' in text
