"""Self-check: compare every rewritten site with dense attention in some runs of a compiled graph.

Two graphs are compiled: the plain one, and one with dense attention beside every site (`Probes`). A run that is due
takes the second, whose further outputs are read and stripped; every other run takes the first, which is the graph that
is compiled without the option. Both are compiled at once, not when first run: the guards that dynamic shapes need can
be made only while Dynamo compiles.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, fx
from torch._guards import CompileContext

from ..attn_ops.errors import PolicyError, SelfCheckError
from .cache import guard_on
from .options import CheckOptions
from .probes import Probes
from .publish import publish, remember
from .regions import region_name
from .report import Report, Row
from .site_check import SiteCheck, limit_of, site_key
from .step_values import StepValues, copied

_log = logging.getLogger("sparseattn")
_alive: weakref.WeakSet[SelfCheck] = weakref.WeakSet()
"""The checks of the graphs that are kept, also of those that a demotion has replaced."""

Run = Callable[..., Any]


class Rewrite(Protocol):
    """`rewrite_graph` for one policy and machine."""

    def __call__(self, module: fx.GraphModule, **how: Any) -> Report:
        """Rewrite a graph in place."""


def compile_checked(
    module: fx.GraphModule,
    asked: CheckOptions,
    rewrite: Rewrite,
    compile_graph: Callable[[fx.GraphModule, StepValues], Run],
) -> Run:
    """Compile a Dynamo graph with and without comparisons, and run each when it is due.

    Args:
        module: the graph; it is left as it is.
        asked: when to compare, and what follows.
        rewrite: rewrites a copy of the graph.
        compile_graph: compiles one.

    Raises:
        PolicyError: if layers are to be demoted and Dynamo cannot be told to compile again, or on a nested region.
    """
    _refuse_nested(module)
    demoted = _demoted_before() if asked.on_failure == "demote" else {}
    plain, checked = copied(module), copied(module)
    values, checked_values, probes = StepValues(plain), StepValues(checked), Probes(checked)
    report = rewrite(plain, values=values, demoted=demoted)
    publish(report)
    if not report.rewritten:
        return compile_graph(plain, values)
    rewrite(checked, values=checked_values, demoted=demoted, probes=probes)
    check = SelfCheck(asked, report, probes.bring_out())
    if asked.on_failure == "demote" and not guard_on(lambda: not check.demoted, "sparseattn self-check: none demoted"):
        raise PolicyError('options: on_failure="demote" must have a torch that can compile again. Use "report".')
    # The plain graph last: what a compilation leaves behind for Dynamo is then that of the graph that stays.
    run_checked = compile_graph(checked, checked_values)
    return check.choose(compile_graph(plain, values), run_checked, _results(module))


def _refuse_nested(module: fx.GraphModule) -> None:
    """AOTAutograd knows an invoke_subgraph by its name, which the two graphs share."""
    graphs = [child.graph for child in module.modules() if isinstance(child, fx.GraphModule)]
    if any(region_name(node) == "invoke_subgraph" for graph in graphs for node in graph.nodes):
        raise PolicyError("options: check must have a model without nested_compile_region, got one. Take either out.")


def _demoted_before() -> dict[Hashable, str]:
    """What earlier compilations of the frame that Dynamo is compiling have demoted; nothing in its first."""
    now = CompileContext.current_compile_id()
    if now is None:
        return {}
    same = [check for check in list(_alive) if check.frame == now.frame_id]
    if not now.frame_compile_id:  # Dynamo was reset, and counts anew: they were of another frame
        for check in same:
            _alive.discard(check)
        return {}
    return {site: why for check in same for site, why in check.demoted.items()}


def _results(module: fx.GraphModule) -> int:
    (results,) = module.graph.output_node().args
    assert isinstance(results, tuple | list)
    return len(results)


class SelfCheck:
    """The comparisons of one compiled graph: when one is due, and what follows from it.

    Args:
        asked: what the user asked.
        report: the decisions of the graph.
        places: for each rewritten site its outputs among those that were added, or why it has none.
    """

    def __init__(self, asked: CheckOptions, report: Report, places: Sequence[tuple[int, ...] | str]) -> None:
        self._asked = asked
        self._report = report
        self._places = places
        self._run = 0
        now = CompileContext.current_compile_id()
        self.frame = None if now is None else now.frame_id
        self.demoted: dict[Hashable, str] = {}
        """The layers that failed and are to become dense, and why."""
        _alive.add(self)

    def choose(self, plain: Run, checked: Run, results: int) -> Run:
        """The graph as Dynamo calls it; of the checked one the first `results` outputs are returned."""

        def run(*inputs: Any) -> Any:
            if self._is_due:
                outputs = checked(*inputs)
                self._read(outputs[results:])
                outputs = outputs[:results]
            else:
                outputs = plain(*inputs)
            self._run += 1  # not reached by an error: the next run is compared again
            return outputs

        return run

    @property
    def _is_due(self) -> bool:
        every = self._asked.every
        return self._run == 0 if every is None else self._run % every == 0

    def _read(self, errors: Sequence[Tensor]) -> None:
        sums = [error.tolist() for error in errors]
        places = iter(self._places)
        rows = [row if row.decision.is_dense else self._judge(row, next(places), sums) for row in self._report.rows]
        self._report = replace(self._report, rows=tuple(rows))
        remember(self._report)
        self._tell()
        self._act([row for row in rows if row.check and row.check.failure])

    def _judge(self, row: Row, places: tuple[int, ...] | str, sums: list[list[float]]) -> Row:
        if isinstance(places, str):
            return replace(row, check=SiteCheck(skipped=places))
        limit = self._asked.limit or limit_of(row.call, row.decision)
        total = [sum(terms) for terms in zip(*(sums[place] for place in places), strict=True)]
        return replace(row, check=SiteCheck.read(total, limit, self._run))

    def _tell(self) -> None:
        compared = [row for row in self._report.rows if row.check and not row.check.skipped]
        for row in compared:
            if row.check and row.check.failure:
                _log.warning("self-check: %s", _sentence(row))
        failed = sum(bool(row.check and row.check.failure) for row in compared)
        _log.info(
            "self-check, run %d: %d sites compared with dense attention, %d failed", self._run, len(compared), failed
        )

    def _act(self, failed: list[Row]) -> None:
        if failed and self._asked.on_failure == "raise":
            told = "\n".join(f"  {_sentence(row)}" for row in failed)
            raise SelfCheckError(
                f"self-check: every rewritten layer must be close to dense attention, got\n{told}\n"
                'Leave them out by a rule with use = "dense", set on_failure="demote", or raise check_limit.'
            )
        if self._asked.on_failure == "demote":
            for row in failed:
                why = f"demoted by the self-check in run {self._run}: {_sentence(row)}"
                self.demoted[site_key(row.module, row.source, row.call, row.decision)] = why


def _sentence(row: Row) -> str:
    assert row.check is not None
    return f"{row.name} ({row.decision.backend} by {row.decision.provider}) has {row.check.failure}"
