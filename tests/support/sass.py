"""The main loop of a compiled attention kernel, in the machine code."""

from __future__ import annotations

import re
from dataclasses import dataclass

PRODUCTS = ("HGMMA", "IGMMA", "QGMMA")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*?(\.L_x_\d+)")


@dataclass(frozen=True)
class Loop:
    """Instructions of a loop in their order, and those that a branch inside of it may skip."""

    instructions: list[str]
    skipped: frozenset[int]

    @property
    def always(self) -> int:
        """How many instructions every step executes, if its waits end at once."""
        return len(self.instructions) - len(self.skipped)

    def order(self, *names: str) -> list[str]:
        """Which of these instructions come after one another, each run of equal ones as one."""
        found = [name for text in self.instructions for name in names if re.search(rf"\b{re.escape(name)}\b", text)]
        return [name for i, name in enumerate(found) if i == 0 or name != found[i - 1]]


def main_loop(sass: str) -> Loop:
    """The first loop with a product of matrices. Waits that were not over at once come back into it from behind."""
    instructions, labels = _listing(sass)
    for end, text in enumerate(instructions):
        begin = _target(text, labels)
        if begin is not None and begin <= end and any(map(_is_product, instructions[begin:end])):
            targets = [(at, _target(instructions[at], labels)) for at in range(begin, end)]
            inside = [range(at + 1, to) for at, to in targets if to is not None and at < to <= end]
            return Loop(instructions[begin : end + 1], frozenset(i for region in inside for i in region))
    raise AssertionError("no loop with a product")


def _listing(sass: str) -> tuple[list[str], dict[str, int]]:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
    return instructions, labels


def _target(text: str, labels: dict[str, int]) -> int | None:
    branch = _BRANCH.search(text)
    return labels.get(branch[1]) if branch else None


def _is_product(text: str) -> bool:
    return any(f"{name}." in text for name in PRODUCTS)
