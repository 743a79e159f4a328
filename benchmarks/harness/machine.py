"""Where and with what a figure was measured: device, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .source_tree import ROOT

_PACKAGES = ("triton", "onnxruntime", "diffusers", "sageattention", "fastvideo-kernel", "flash-attn-4")
_CPU_FEATURES = {"avx512f": "AVX512", "avx2": "AVX2"}
_CPU_EXTRAS = {"avx512_bf16": "BF16", "avx512_vnni": "VNNI", "amx_tile": "AMX"}


@dataclass(frozen=True)
class Stamp:
    """The circumstances of a measurement.

    Args:
        device: what computed, for people: a CPU with its number of CPUs and instructions, or a GPU.
        versions: Python, torch, CUDA, the tiles of the Triton kernels, and the optional packages that are installed.
        commit: short hash of the source, with "+" if files differed from it; "unknown" outside a git checkout.
        date: UTC, ISO 8601 to the second.
    """

    device: str
    versions: Mapping[str, str]
    commit: str
    date: str


def take_stamp(device: str = "cpu", commit: str | None = None) -> Stamp:
    """The circumstances now; `commit` is for a tree that came without its git folder."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return Stamp(name, _versions(device), commit or _commit(), now.isoformat())


def cpu_name() -> str:
    """The CPU, as "AMD EPYC (Zen 4), 2 CPUs, AVX512 BF16 VNNI"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    flags = set(fields.get("flags", "").split())
    vectors = next((text for flag, text in _CPU_FEATURES.items() if flag in flags), "")
    extras = [text for flag, text in _CPU_EXTRAS.items() if flag in flags]
    name = fields.get("model name") or platform.processor() or platform.machine()
    parts = (name + _zen(fields, flags), f"{os.cpu_count()} CPUs", " ".join([vectors, *extras]).strip())
    return ", ".join(filter(None, parts))


def _zen(fields: Mapping[str, str], flags: set[str]) -> str:
    """AMD's generation, which server names do not tell: family 25 is Zen 3, or Zen 4 if it has AVX512."""
    if fields.get("vendor_id") != "AuthenticAMD":
        return ""
    generation = {"25": 4 if "avx512f" in flags else 3, "26": 5}.get(fields.get("cpu family", ""))
    return f" (Zen {generation})" if generation else ""


def _versions(device: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        from sparseattn.attn_ops.kernels.triton.tuned_tiles import detail

        found |= {"cuda": str(torch.version.cuda), "tiles": detail()}
    installed = {name: next(importlib.metadata.distributions(name=name), None) for name in _PACKAGES}
    return found | {name: one.version for name, one in installed.items() if one}


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short", "HEAD").strip()
        # What a run writes itself does not make it another source.
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+" if changed.strip() else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
