"""The page of a report: well formed, whole, escaped, and loading nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

from support.attention_model import Blocks, tokens

import sparseattn
from sparseattn import Policy, Rule
from sparseattn.fx_passes.report import Report
from sparseattn.fx_passes.site_check import SiteCheck

VOID = ("meta", "br")


class Page(HTMLParser):
    """The text of a page and its tags; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self._open else ""


def report(layers: int = 3) -> Report:
    policy = Policy([Rule("dense", modules="blocks.0", why="as it was"), Rule("block_topk, flash")], name="mine")
    return sparseattn.explain(Blocks(layers), tokens(length=96), policy=policy)


def test_it_holds_every_site_and_what_is_above_them() -> None:
    found = report()
    page = Page(found.to_html())
    for needle in ("blocks.0", "blocks.1", "blocks.2", "2 block_topk, 1 sdpa", "mine", found.policy_hash, "as it was"):
        assert needle in page.text
    assert found.capability in page.text
    assert page.text.count("Why not what else the policy names") == 2
    assert "flash: rule 2 names block_topk before it (2)" in page.text


def test_what_a_group_has_in_common_is_told_once() -> None:
    page = Page(report(9).to_html())
    assert page.text.count("2,2,96,16") == 2  # once for the dense site, once for the eight others
    assert page.tags.count("table") == 1
    assert page.tags.count("tr") == 1 + 8


def test_it_loads_nothing_and_runs_nothing() -> None:
    text = report().to_html()
    page = Page(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert {"src", "href"}.isdisjoint(name for name, _ in page.attributes)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?:|url\(|@import", text)


def test_it_is_for_phones_and_for_the_dark() -> None:
    text = report().to_html()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme:dark" in text
    assert "overflow-wrap:anywhere" in text


def test_everything_is_escaped() -> None:
    nasty = "<script>alert('x')</script>&\"quoted\""
    found = report()
    rows = tuple(
        replace(row, module=f"{nasty}{i}", decision=replace(row.decision, why=nasty, rejected=((nasty, (nasty,)),)))
        for i, row in enumerate(found.rows)
    )
    checked = tuple(replace(row, check=SiteCheck(skipped=nasty)) for row in rows)
    text = replace(found, rows=checked, policy=nasty, capability=nasty, notes=(nasty,), policy_hash=nasty).to_html()
    page = Page(text)
    assert "script" not in page.tags
    assert page.text.count(nasty) >= 9


def test_results_of_the_self_check_are_above_and_beside_the_sites() -> None:
    found = report(4)
    checks = (None, SiteCheck(0.99, 0.1, limit=0.3), SiteCheck(0.5, 0.7, limit=0.3), SiteCheck(skipped="its region"))
    rows = tuple(replace(row, check=check) for row, check in zip(found.rows, checks, strict=True))
    page = Page(replace(found, rows=rows).to_html())
    assert "2 compared with dense attention, 1 failed, 1 not checked" in page.text
    assert "blocks.2: relative L1 0.7 to dense attention, limit 0.3 (cosine 0.5000)" in page.text
    assert page.text.count("FAILED") == 1
    assert "not checked: its region" in page.text


def test_of_many_failures_and_reasons_the_first_are_told() -> None:
    found = report(12)
    rows = tuple(replace(row, check=SiteCheck(0.5, 0.7, limit=0.3)) for row in found.rows)
    page = Page(replace(found, rows=rows).to_html())
    assert page.text.count("relative L1 0.7") == 6
    assert "and 6 more" in page.text


def test_a_report_without_sites_is_a_page() -> None:
    assert "nothing to rewrite" in Page(Report(policy="disabled").to_html()).text
