"""Policy: an ordered list of rules, what the user wants of attention.

Immutable, hashable and made of plain values, so that it can be a compile option, a cache key and a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..attn_ops.errors import PolicyError
from ..attn_ops.param import varies
from ..attn_ops.step_range import Step
from .measured import Measured
from .policy_file import SUFFIXES, VERSION, check_version, parse_table, read_table, to_json, to_toml, write_table
from .rule import Mode, Rule
from .rule_fields import as_text

__all__ = ["VERSION", "Mode", "Policy", "PolicySource", "Rule"]


@dataclass(frozen=True)
class Policy:
    """Rules in order. The first `prefer` or `require` rule that matches a site decides; no match leaves it dense.

    Args:
        rules: the rules; stored as a tuple.
        name: what reports call it.
        version: version of the schema; only 1 exists.
        measured: what the rules were measured on, and what came out; None if that is not known. It decides nothing, so
            `==`, `hash()` and the hash of the report leave it out: adding it recompiles nothing.

    Raises:
        PolicyError: if an argument has a wrong type, the version is unknown, or `measured` tells of a rule that is not
            there.
    """

    rules: Sequence[Rule]
    name: str = "custom"
    version: int = VERSION
    measured: Measured | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        rules: object = self.rules
        if not isinstance(rules, list | tuple) or not all(isinstance(rule, Rule) for rule in rules):
            raise PolicyError(f'rules must be a list of Rule, got {rules!r}. Write for example [Rule("flash")].')
        object.__setattr__(self, "rules", tuple(rules))
        as_text("name", self.name)
        check_version(self.version)
        _check_measured(self.measured, len(rules))

    @classmethod
    def preset(cls, name: str) -> Policy:
        """The policy "exact", "auto", "balanced" or "fast".

        Raises:
            PolicyError: if there is no preset of that name; the message names the nearest.
        """
        from .presets import preset

        return preset(name)

    @classmethod
    def load(cls, source: PolicySource) -> Policy:
        """A policy from whatever a user may write.

        Args:
            source: a Policy; a table of the file's schema; a path to a .toml or .json file; or the name of a preset. A
                str that ends in .toml or .json is a path.

        Raises:
            PolicyError: if it cannot be read or is not valid; the message says where.
        """
        if isinstance(source, Policy):
            return source
        if isinstance(source, Mapping):
            return cls._parse(source, "policy")
        if not isinstance(source, str | os.PathLike):
            raise PolicyError(f"policy must be a Policy, a table, a path or the name of a preset, got {source!r}.")
        if isinstance(source, str) and not source.endswith(SUFFIXES):
            return cls.preset(source)
        path = Path(source)
        return cls._parse(read_table(path), str(path), path.stem)

    @classmethod
    def _parse(cls, table: object, where: str, name: str = "custom") -> Policy:
        arguments = {"name": name, **parse_table(table, where)}
        try:
            return cls(**arguments)
        except PolicyError as error:
            raise PolicyError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The table that `load` reads: version, name, rules without fields that have their default, and measured."""
        measured = {} if self.measured is None else {"measured": self.measured.to_dict()}
        rules = [rule.to_dict() for rule in self.rules]
        return {"version": self.version, "name": self.name, "rules": rules, **measured}

    def to_toml(self) -> str:
        """The policy as the text of a .toml file."""
        return to_toml(self.to_dict())

    def to_json(self) -> str:
        """The policy as the text of a .json file."""
        return to_json(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a .toml or .json file.

        Raises:
            PolicyError: if the path has another suffix.
        """
        write_table(self.to_dict(), Path(path))

    @property
    def varies(self) -> bool:
        """Whether a parameter follows the steps or differs by head, so that a call must bring its value."""
        return any(varies(value) for rule in self.rules for _, value in rule.params)

    def in_force(self, step: Step | None) -> tuple[bool, ...]:
        """Which of the rules that name steps cover this one. Steps of the same answer have the same decisions.

        Raises:
            PolicyError: if a rule counts from the end, or in fractions, and the number of steps is not set.
        """
        return tuple(rule.covers(step) for rule in self.rules if rule.steps is not None)

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits, the same everywhere: policies of one hash decide alike.

        Labels (`name`, every `why`) and what was measured are left out.
        """
        rules = [{key: value for key, value in rule.to_dict().items() if key != "why"} for rule in self.rules]
        canonical = json.dumps([self.version, rules], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _check_measured(measured: object, rules: int) -> None:
    if measured is None:
        return
    if not isinstance(measured, Measured):
        raise PolicyError(f"measured must be a Measured or None, got {measured!r}. Write Measured(error=0.013).")
    for entry in measured.rules:
        if entry.rule > rules:
            raise PolicyError(f"measured: there is no rule {entry.rule}, the policy has {rules}. Correct or remove it.")


PolicySource = Policy | Mapping[str, Any] | str | os.PathLike[str]
"""What may stand where a policy is asked for: see `Policy.load`."""
