"""The command line's `sparseattn calibrate`: a policy file from a model, samples and the error that is allowed.

Two files are written: the state, after every sample, and at the end the policy, each whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..attn_ops.errors import SparseAttnError
from ..lowering.policy import Policy, Rule
from ..lowering.policy_file import SUFFIXES
from .calibration.candidates import DEFAULT
from .calibration.ledger import Objective
from .calibration.output_error import Metric
from .target import load_samples, on_one_line

if TYPE_CHECKING:
    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

_TARGET = "FILE.py:NAME or package.module:NAME; NAME() returns (model, inputs) or (model, samples), see below"

_EPILOG = """\
what NAME() returns:
  model, (x, t)                 a tuple: the positional inputs of one call
  model, {"x": x, "t": t}       a dict: the keyword inputs of one call
  model, [(x1, t1), (x2, t2)]   a list: samples, each a tuple, a dict or a
                                sparseattn.Sample, which may name its step:
                                Sample((x, t), step=3), with --total-steps

Ctrl-C, or whatever else ends it, loses one sample at most: the same command
goes on from the state file. The file stays: with it, another budget or metric
needs no measuring. Delete it when it is of no more use.

exit code:
  0    the policy is written
  1    nothing but dense attention is within the budget; no policy is written
  2    wrong use, or a model that cannot be calibrated; no policy is written
  130  interrupted; no policy is written
"""


def add_calibrate(verbs: _Verbs) -> None:
    """Add the verb `calibrate` to the command line."""
    verb = verbs.add_parser(
        "calibrate",
        help="find the policy that saves most within an error budget",
        description="Find the policy that saves most while the model's error stays within a budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("target", help=_TARGET)
    verb.add_argument(
        "--budget", type=float, required=True, help="largest error of the output, such as 0.02; in psnr, the least dB"
    )
    verb.add_argument("-o", "--output", required=True, metavar="FILE", help="the policy, a .toml or .json file")
    verb.add_argument("--force", action="store_true", help="replace the policy file if there is one")
    verb.add_argument("--state", metavar="FILE", help="keeps what was measured (default: the policy's name + .state)")
    _add_choices(verb)
    verb.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a bar on stderr (default: if that is a terminal)"
    )
    verb.set_defaults(command=_calibrate)


def _add_choices(verb: argparse.ArgumentParser) -> None:
    """What is tried, and what counts."""
    verb.add_argument(
        "--candidates",
        default=",".join(DEFAULT),
        metavar="NAMES",
        help="comma-separated: backends, each tried with a ladder of ratios, and policy files, of which each rule is "
        "tried (default: %(default)s)",
    )
    verb.add_argument(
        "--metric",
        choices=get_args(Metric),
        default="relative_l1",
        help="what the error is, of the output to that with dense attention (default: %(default)s)",
    )
    verb.add_argument(
        "--objective",
        choices=get_args(Objective),
        default="time",
        help="what is saved: time on this machine, or work, the scores that are computed (default: %(default)s)",
    )
    verb.add_argument(
        "--machine", metavar="NAME", help='with time, a GPU that is not here, "sm90", whose times are predicted'
    )
    verb.add_argument(
        "--weigh",
        choices=("output", "site"),
        default="output",
        help="what a layer's error is taken for: what it does to the model's output, by backward passes, or to its own "
        "site's (default: %(default)s)",
    )
    verb.add_argument("--total-steps", type=int, metavar="N", help="length of the loop whose steps the samples name")
    verb.add_argument(
        "--buckets",
        type=int,
        default=1,
        metavar="N",
        help="equal ranges of steps that may be served differently (default: %(default)s)",
    )


def _calibrate(options: argparse.Namespace) -> tuple[str, int]:
    from .calibration.calibrate import calibrate

    out = _checked_output(Path(options.output), options.force)
    state = _in_a_folder("--state", Path(options.state or f"{out}.state"))
    candidates = _candidates(options.candidates)
    model, samples = load_samples("calibrate", options.target)
    try:
        with on_one_line(f"calibrate: {options.target}"):
            policy = calibrate(
                model,
                samples,
                budget=options.budget,
                candidates=candidates,
                metric=options.metric,
                objective=options.objective,
                machine=options.machine,
                weigh=options.weigh,
                total_steps=options.total_steps,
                buckets=options.buckets,
                state=state,
                progress=sys.stderr.isatty() if options.progress is None else options.progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(state)) from None
    if not policy.rules:
        told = f"nothing but dense attention is within a budget of {options.budget:g} {options.metric}"
        return f"{told}; {out} is not written", 1
    _write(policy, out, state)
    return _summary(policy, out, state, options), 0


def _checked_output(out: Path, force: bool) -> Path:
    """The path, if a policy may be written there: found out now, not after hours."""
    if out.suffix not in SUFFIXES:
        raise SparseAttnError(f"calibrate: --output must end in .toml or .json, got {out}.")
    if _in_a_folder("--output", out).exists() and not force:
        raise SparseAttnError(f"calibrate: {out} exists. Name another file, or say --force to replace it.")
    return out


def _in_a_folder(flag: str, file: Path) -> Path:
    """The path, if a file can be there."""
    if not file.parent.is_dir():
        raise SparseAttnError(f"calibrate: {flag} {file}: there is no folder {file.parent}. Make it first.")
    if not os.access(file.parent, os.W_OK) or file.is_dir():
        raise SparseAttnError(f"calibrate: {flag} {file} cannot be written. Name another.")
    return file


def _candidates(text: str) -> list[str | Rule]:
    """Names of backends as they are; of a policy file the rules."""
    found: list[str | Rule] = []
    for word in (word.strip() for word in text.split(",")):
        found += Policy.load(word).rules if word.endswith(SUFFIXES) else [word]
    return found


def _how_to_go_on(state: Path) -> str:
    if state.exists():
        return f"what was measured is in {state}. Run the same command again to go on."
    return "nothing was measured yet."


def _write(policy: Policy, out: Path, state: Path) -> None:
    """Write the file, whole or not at all."""
    text = policy.to_toml() if out.suffix == ".toml" else policy.to_json()
    part = out.with_name(f"{out.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        raise SparseAttnError(
            f"calibrate: {out} cannot be written: {error.strerror}. {_how_to_go_on(state).capitalize()}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _summary(policy: Policy, out: Path, state: Path, options: argparse.Namespace) -> str:
    measured = policy.measured
    assert measured is not None
    sites = {(module, rule.kind) for rule in policy.rules for module in rule.modules}
    lines = {
        "policy": f"{out} ({policy.hash})",
        "budget": f"{options.budget:g} {options.metric}",
        "error": _brief(measured.error),
        "density": _brief(measured.density),
        "sites": f"{len(sites)} rewritten; sparseattn explain {options.target} --policy {out} shows them",
        "state": f"{state}; with it, another budget needs no measuring",
    }
    return "\n".join(f"{name:7}  {value}" for name, value in lines.items())


def _brief(number: float | None) -> str:
    return "not known" if number is None else f"{number:.3g}"
