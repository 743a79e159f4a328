"""The command line: `sparseattn backends | explain | calibrate | policy | bench | tune | env`.

Exit code 0 on success, 1 when a rule with mode="require" is not met, 2 on wrong use, 130 when interrupted; `calibrate`
and `policy` document what 1 means for them. What goes wrong is told on stderr, without a traceback.
Dynamo is imported by the verbs that need it: help comes at once, and an interruption while it loads is clean too.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..attn_ops.call import AttentionCall
from ..attn_ops.capability import Capability
from ..attn_ops.errors import RequirementError, SparseAttnError
from ..attn_ops.registry import backends
from ..lowering.selection_table import selection_page
from .bench import COLUMNS, measure
from .cli_calibrate import add_calibrate
from .cli_policy import add_policy
from .cli_tune import add_tune
from .table import aligned
from .target import TARGET, load_target, on_one_line

if TYPE_CHECKING:
    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


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
    except KeyboardInterrupt as interruption:
        print(": ".join(filter(None, ("interrupted", str(interruption)))), file=sys.stderr)
        return 130
    text, code = (answer, 0) if isinstance(answer, str) else answer
    print(text)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseattn",
        description="Faster attention in models nobody has to edit.",
        epilog='Exit code: 0; 1 if a rule with mode="require" is not met, or as calibrate, policy diff and policy '
        "validate say; 2 on wrong use; 130 when interrupted. sparseattn VERB --help tells more.",
    )
    verbs = parser.add_subparsers(required=True, metavar="backends | explain | calibrate | policy | bench | tune | env")
    _add_backends(verbs)
    _add_explain(verbs)
    add_calibrate(verbs)
    add_policy(verbs)
    _add_bench(verbs)
    add_tune(verbs)
    _add_env(verbs)
    return parser


def _add_backends(verbs: _Verbs) -> None:
    verb = verbs.add_parser(
        "backends",
        help="what this machine, or another, can run, and what is missing",
        description="Every backend with those who can compute it on a machine, or the reason, and what to install.",
    )
    verb.add_argument("--capability", metavar="NAME", help='a machine, "sm90" or "cpu-avx512"; default: this one')
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the same for programs")
    form.add_argument("--markdown", action="store_true", help="the page docs/selection.md: what every machine gets")
    verb.set_defaults(command=_backends)


def _add_explain(verbs: _Verbs) -> None:
    verb = verbs.add_parser(
        "explain",
        help="what a policy would do to a model, without running it",
        description="Every attention of a model: what a policy makes of it on a machine, and why. Nothing is run.",
        epilog='Exit code: 0; 1 if a rule with mode="require" is not met; 2 on wrong use.',
    )
    verb.add_argument("target", help=f"{TARGET}; of a list of samples, the first counts")
    verb.add_argument("--policy", help="a preset or a file; default: as torch.compile would choose")
    verb.add_argument("--capability", metavar="NAME", help='a machine, "sm90"; default: this one')
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the same for programs")
    form.add_argument("--html", action="store_true", help="the same as a page")
    verb.set_defaults(command=_explain)


def _add_bench(verbs: _Verbs) -> None:
    verb = verbs.add_parser(
        "bench",
        help="time backends against dense SDPA on one shape",
        description="Time backends against dense scaled_dot_product_attention on random data of one shape.",
    )
    verb.add_argument("--shape", default="1,8,4096,64", help="B,H,S,D (default: %(default)s)")
    verb.add_argument("--backends", default="flash,block_topk", help="comma-separated (default: %(default)s)")
    verb.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="(default: %(default)s)"
    )
    verb.add_argument("--device", default="cpu", help="(default: %(default)s)")
    verb.add_argument("--repeats", type=int, default=7, metavar="N", help="timed runs of each (default: %(default)s)")
    verb.add_argument("--csv", action="store_true", help="the same for programs")
    verb.set_defaults(command=_bench)


def _add_env(verbs: _Verbs) -> None:
    verb = verbs.add_parser(
        "env",
        help="versions and capabilities, for a bug report",
        description="Versions, packages and what this machine can do: put it into a bug report.",
    )
    verb.add_argument("--json", action="store_true", help="the same for programs")
    verb.set_defaults(command=_env)


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
    from .explain import explain

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
