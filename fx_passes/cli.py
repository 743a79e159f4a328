"""The command line: `sparseattn backends | explain | policy | bench | env`.

Exit code 0 on success, 1 when a rule with mode="require" is not met, 2 on wrong use, 130 when interrupted; `policy`
documents what 1 means for its verbs. What goes wrong is told on stderr, without a traceback.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..attn_ops.call import AttentionCall
from ..attn_ops.capability import Capability
from ..attn_ops.errors import RequirementError, SparseAttnError
from ..attn_ops.registry import backends
from ..lowering.selection_table import selection_page
from .bench import COLUMNS, measure
from .cli_policy import add_policy
from .explain import explain
from .table import aligned
from .target import TARGET, load_target, on_one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], str | tuple[str, int]] = options.command
    try:
        answer = command(options)
    except RequirementError as error:
        print(error, file=sys.stderr)
        return 1
    except SparseAttnError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    text, code = (answer, 0) if isinstance(answer, str) else answer
    print(text)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseattn",
        description="Faster attention in models nobody has to edit.",
        epilog='Exit code: 0; 1 if a rule with mode="require" is not met, or as policy diff and validate say; '
        "2 on wrong use; 130 when interrupted.",
    )
    verbs = parser.add_subparsers(required=True, metavar="backends | explain | policy | bench | env")
    verb = verbs.add_parser("backends", help="what this machine, or another, can run, and what is missing")
    verb.add_argument("--capability", help='a machine by name, "sm90" or "cpu-avx512"; default: this one')
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true", help="the page docs/selection.md: what every machine gets")
    verb.set_defaults(command=_backends)
    verb = verbs.add_parser("explain", help="what a policy would do to a model, without running it")
    verb.add_argument("target", help=TARGET)
    verb.add_argument("--policy", help="a preset or a file; default: as torch.compile would choose")
    verb.add_argument("--capability", help='a machine by name, "sm90"; default: this one')
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--html", action="store_true")
    verb.set_defaults(command=_explain)
    add_policy(verbs)
    verb = verbs.add_parser("bench", help="time backends against dense SDPA on one shape")
    verb.add_argument("--shape", default="1,8,4096,64", help="B,H,S,D (default: %(default)s)")
    verb.add_argument("--backends", default="flash,block_topk", help="comma-separated (default: %(default)s)")
    verb.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    verb.add_argument("--device", default="cpu")
    verb.add_argument("--repeats", type=int, default=7)
    verb.add_argument("--csv", action="store_true")
    verb.set_defaults(command=_bench)
    verb = verbs.add_parser("env", help="versions and capabilities, for a bug report")
    verb.add_argument("--json", action="store_true")
    verb.set_defaults(command=_env)
    return parser


def _machine(name: str | None) -> Capability:
    if name is not None:
        return Capability.of(name)
    return Capability.current("cuda" if torch.cuda.is_available() else "cpu")


def _backends(options: argparse.Namespace) -> str:
    if options.markdown:
        return selection_page().rstrip("\n")
    machine = _machine(options.capability)
    here = options.capability is None
    rows = [row for spec in backends().values() for row in _provider_rows(spec, machine, here)]
    if options.json:
        keys = ("backend", "op", "kind", "provider", "available", "why_not", "detail")
        return json.dumps(
            {"machine": str(machine), "providers": [dict(zip(keys, row, strict=True)) for row in rows]}, indent=2
        )
    lines = [(b, o, k, p, "yes" if ok else "no", "; ".join(why) or detail) for b, o, k, p, ok, why, detail in rows]
    heading = ("backend", "op", "kind", "provider", "available", "why not, or what serves it")
    return "\n".join([f"sparseattn on {machine}", *aligned([heading, *lines])])


def _provider_rows(spec: Any, machine: Capability, here: bool) -> list[tuple[str, str, str, str, bool, list[str], str]]:
    """Every provider of a backend, judged by a call that all of them would take, with what serves it if we are here."""
    dtype = torch.bfloat16 if machine.device == "cuda" else torch.float32
    call = AttentionCall(1, 8, 8, 4096, 4096, 64, dtype=dtype, device=machine.device)
    rows = []
    for provider in spec.providers:
        why = provider.reasons(call, machine)
        detail = provider.detail()() if here and not why and provider.detail is not None else ""
        rows.append((spec.name, spec.op, spec.kind, provider.name, not why, why, detail))
    return rows


def _explain(options: argparse.Namespace) -> str:
    model, args, kwargs = load_target("explain", options.target)
    with torch.no_grad(), on_one_line(f"explain: {options.target}"):
        report = explain(model, *args, policy=options.policy, capability=options.capability, **kwargs)
    if options.json:
        return report.to_json()
    return report.to_html() if options.html else str(report)


def _bench(options: argparse.Namespace) -> str:
    try:
        batch, heads, seq, dim = (int(size) for size in options.shape.split(","))
    except ValueError:
        raise SparseAttnError(f"bench: --shape must be four numbers B,H,S,D, got {options.shape!r}.") from None
    names = [name.strip() for name in options.backends.split(",")]
    dtype = getattr(torch, options.dtype)
    with on_one_line("bench"):
        rows = measure(names, (batch, heads, seq, dim), dtype, options.device, options.repeats)
    lines = [COLUMNS, *(row.cells() for row in rows)]
    if options.csv:
        return "\n".join(",".join(f'"{cell}"' if "," in cell else cell for cell in line) for line in lines)
    return "\n".join(aligned(lines))


def _env(options: argparse.Namespace) -> str:
    from .. import __version__

    machine = _machine(None)
    facts = {
        "sparseattn": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "machine": str(machine),
        "threads": torch.get_num_threads(),
        "packages": dict(machine.packages),
        "backends": sorted(backends()),
    }
    if options.json:
        return json.dumps(facts, indent=2)
    return "\n".join(f"{name}: {value}" for name, value in facts.items())
