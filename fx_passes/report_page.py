"""The page of a report: one HTML file that reads on a phone and on a desk, in the light and in the dark.

Sites that became the same stand together; what all of a group have in common is told once, above its table. Nothing is
loaded from elsewhere and no script runs; all text is escaped.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..attn_ops.registry import backend
from .site_check import COLUMNS as CHECK_COLUMNS

if TYPE_CHECKING:
    from .report import Report, Row

_LISTED = 6
"""Failures, and reasons of a candidate, that are told: there may be one for each layer."""

_Numbered = tuple[int, "Row"]

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--paper:#fff;--card:#f6f8fa;
--sparse:#0a5fb0;--quantized:#7a4b00;--exact:#1a6b34;--dense:#59636e;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa6b2;--line:#3d444d;--paper:#0d1117;--card:#151b23;
--sparse:#6cb6ff;--quantized:#e3b341;--exact:#57c878;--dense:#9aa6b2;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;font:16px/1.45 system-ui,sans-serif;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.3rem;margin:.2rem 0 .6rem}h2{font-size:1.05rem;margin:0 0 .3rem}p{margin:.3rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:.6rem 0}
dt,.soft,th,td::before{color:var(--soft)}dd{margin:0}
.note{border-left:3px solid var(--quantized);padding-left:.7rem}.bad{color:var(--bad);font-weight:600}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.8rem 1rem;margin:1rem 0}
.sparse{color:var(--sparse)}.quantized{color:var(--quantized)}.exact{color:var(--exact)}.dense{color:var(--dense)}
table{border-collapse:collapse;width:100%;font-size:.875rem;margin-top:.5rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;border-top:1px solid var(--line)}
th{font-weight:500;border-top:0}th:first-child{width:3rem}td{font-variant-numeric:tabular-nums}
details{margin:.4rem 0}summary{cursor:pointer;color:var(--soft)}ul{margin:.3rem 0;padding-left:1.2rem}
@media(max-width:48rem){thead{display:none}table,tbody,tr{display:block}
tr{border-top:1px solid var(--line);padding:.4rem 0;display:flex;flex-wrap:wrap;gap:0 .9rem}
td{border:0;padding:0}td:empty{display:none}td::before{content:attr(data-name) " "}
td.number{flex:0 0 1.6rem;color:var(--soft)}td.layer{flex:1 1 80%;font-weight:600}
td.number::before,td.layer::before{content:""}}
"""


def page(report: Report) -> str:
    """The report as the text of an HTML file."""
    title = f"sparseattn report, policy {report.policy}"
    groups = "".join(_group(rows, report.named) for rows in _alike(report.rows))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>sparseattn report</h1>{_summary(report)}{groups}</body></html>\n"
    )


def _summary(report: Report) -> str:
    """What there is to know before any site: the counts, the policy, the machine, checks that failed, notes."""
    facts = [("Sites", str(len(report.rows))), ("Became", _counts(report))]
    policy = f"{report.policy} ({report.policy_hash})" if report.policy_hash else report.policy
    facts += [("Policy", policy), ("Machine", report.capability)]
    if report.hoisted.sites:
        facts.append(("Tiling", str(report.hoisted)))
    if report.communication:
        facts.append(("Communication", report.communication))
    if checks := _checks(report):
        facts.append(("Self-check", checks))
    listed = "".join(f"<dt>{name}</dt><dd>{html.escape(told)}</dd>" for name, told in facts if told)
    failed = "".join(f'<p class="bad">{html.escape(sentence)}</p>' for sentence in _failures(report))
    notes = "".join(f'<p class="note">Note: {html.escape(note)}</p>' for note in report.notes)
    return f"<dl>{listed}</dl>{failed}{notes}"


def _counts(report: Report) -> str:
    return ", ".join(f"{count} {name}" for name, count in report.chosen.most_common()) or "nothing to rewrite"


def _checks(report: Report) -> str:
    """How many sites were compared with dense attention, and how many failed; "" if none was to be."""
    checks = [row.check for row in report.rows if row.check is not None]
    if not checks:
        return ""
    skipped, failed = sum(bool(check.skipped) for check in checks), sum(bool(check.failure) for check in checks)
    parts = [f"{len(checks) - skipped} compared with dense attention", f"{failed} failed"]
    return ", ".join([*parts, *([f"{skipped} not checked"] if skipped else [])])


def _failures(report: Report) -> list[str]:
    """The first sites that failed, and how many more did."""
    checked = [(row.name, row.check.failure) for row in report.rows if row.check is not None]
    failed = [f"{name}: {failure}" for name, failure in checked if failure]
    return [*failed[:_LISTED], *([f"and {len(failed) - _LISTED} more"] if len(failed) > _LISTED else [])]


def _alike(rows: Sequence[Row]) -> Iterable[list[_Numbered]]:
    """The rows that became the same, with their numbers; in the order of the first of each."""
    groups: dict[object, list[_Numbered]] = {}
    for numbered in enumerate(rows):
        decision = numbered[1].decision
        groups.setdefault((decision.backend, decision.provider), []).append(numbered)
    return groups.values()


def _group(rows: list[_Numbered], named: Sequence[str]) -> str:
    decision, columns = rows[0][1].decision, rows[0][1].columns()
    kind = "dense" if decision.backend is None else backend(decision.backend).kind
    sites = f"{len(rows)} site{'' if len(rows) == 1 else 's'}"
    chosen, provider = (html.escape(columns[name]) for name in ("chosen", "provider"))
    head = f'<span class="{kind}">{chosen}</span> <span class="soft">by {provider}, {kind}</span>'
    return f"\n<section><h2>{sites}: {head}</h2>{_sites(rows)}{_why_not(rows, named)}</section>"


def _sites(rows: list[_Numbered]) -> str:
    """The columns that all rows have in common as a list, the others as a table."""
    lines = [dict(_cells(number, row)) for number, row in rows]
    common = {name for name in lines[0] if len({line[name] for line in lines}) == 1}
    told = {name: lines[0][name] for name in lines[0] if name in common and lines[0][name] not in ("", "-")}
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in told.items())
    listed = f"<dl>{facts}</dl>" if facts else ""
    own = [name for name in lines[0] if name not in common]
    if not own:
        return listed
    head = "".join(f"<th>{html.escape(name)}</th>" for name in own)
    body = "".join(f"<tr>{''.join(_cell(name, line[name]) for name in own)}</tr>" for line in lines)
    return f"{listed}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(number: int, row: Row) -> Iterator[tuple[str, str]]:
    """Name and text of every column."""
    columns = row.columns()
    yield "#", str(number)
    yield from ((name, columns[name]) for name in ("layer", "kind", "B,H,S,D", "dtype", "params", "rule", "why"))
    yield from zip(CHECK_COLUMNS, row.check.cells() if row.check else ("",) * len(CHECK_COLUMNS), strict=True)


def _cell(name: str, text: str) -> str:
    kind = {"#": ' class="number"', "layer": ' class="layer"'}.get(name, ' class="bad"' if text == "FAILED" else "")
    return f'<td data-name="{html.escape(name)}"{kind}>{html.escape(text)}</td>'


def _why_not(rows: list[_Numbered], named: Sequence[str]) -> str:
    """Folded: the candidates of the policy with their reasons and the number of sites of each, then all others."""
    reasons: dict[str, Counter[str]] = {}
    for _, row in rows:
        for candidate, sentences in row.decision.rejected:
            reasons.setdefault(candidate, Counter()).update(sentences)
    told = {"Why not what else the policy names": "", "Why not what it does not name": ""}
    for candidate, counts in reasons.items():
        of_policy, others = told
        title = of_policy if candidate.partition("/")[0] in named else others
        told[title] += f"<li>{html.escape(f'{candidate}: {_told(counts)}')}</li>"
    return "".join(
        f"<details><summary>{title}</summary><ul>{entries}</ul></details>" for title, entries in told.items() if entries
    )


def _told(counts: Counter[str]) -> str:
    sentences = [f"{sentence} ({count})" for sentence, count in counts.most_common(_LISTED)]
    return "; ".join([*sentences, *([f"and {len(counts) - _LISTED} more"] if len(counts) > _LISTED else [])])
