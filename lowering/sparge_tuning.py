"""SpargeTuning: the thresholds of SpargeAttention for every layer and head, as rules and as a file.

All of them are fp32 numbers from where they are found to where they are used, and belong to the path of a module.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..attn_ops.blocks.sparge_arguments import MAX_PV_THRESHOLD
from ..attn_ops.call import Params
from ..attn_ops.errors import PolicyError
from .rule import Mode, Rule

SEARCHED = ("keep_ratio", "mass", "pv_threshold", "similarity", "sparsity")
"""Parameters of `sparge` that a tuning decides."""

_LIMITS = {
    "mass": (0.0, 1.0),
    "similarity": (-1.0, 1.0),
    "pv_threshold": (0.0, MAX_PV_THRESHOLD),
    "sparsity": (0.0, 1.0),
    "error": (0.0, math.inf),
}
_MAY_BE_EMPTY = ("pv_threshold", "sparsity", "error")


@dataclass(frozen=True)
class SpargeSite:
    """The self-attention of one module: one number for each head.

    Args:
        module: path of the module that owns it, such as "blocks.0.attn1".
        mass: as in `sparge_attention`, 0 ... 1; 1 keeps every block.
        similarity: as there, -1 ... 1; 0 or less is no test.
        pv_threshold: as there, at least 0; () is no second stage.
        sparse: whether a head leaves out enough blocks to be worth it. If none does, the site stays dense.
        sparsity: share of the key blocks that it leaves out, mean over the samples, the second stage not counted; () if
            not measured.
        error: relative L1 of its output to dense attention's, largest of the samples; () if not measured.
        why: why the site stays dense; "" if it does not, or that is not known.

    Raises:
        PolicyError: on a number out of range, NaN, or lists that are not equally long; it names the module.
    """

    module: str
    mass: Sequence[float]
    similarity: Sequence[float]
    pv_threshold: Sequence[float] = ()
    sparse: Sequence[bool] = ()
    sparsity: Sequence[float] = ()
    error: Sequence[float] = ()
    why: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.module, str) or not self.module:
            raise PolicyError(f"sparge tuning: module must be the path of a module, got {self.module!r}.")
        if not isinstance(self.why, str):
            raise PolicyError(f"sparge tuning: {self.module}: why must be a str, got {self.why!r}.")
        for name, limits in _LIMITS.items():
            object.__setattr__(self, name, self._numbers(name, limits))
        if not isinstance(self.sparse, list | tuple) or not all(type(flag) is bool for flag in self.sparse):
            raise PolicyError(f"sparge tuning: {self.module}: sparse must be a list of bool, got {self.sparse!r}.")
        object.__setattr__(self, "sparse", tuple(self.sparse))
        for name in (*_LIMITS, "sparse"):
            given = len(getattr(self, name))
            if given != len(self.mass) and not (name in _MAY_BE_EMPTY and given == 0):
                raise PolicyError(
                    f"sparge tuning: {self.module}: {name} must have a number for each of {len(self.mass)} heads, "
                    f"got {given}."
                )

    def _numbers(self, name: str, limits: tuple[float, float]) -> tuple[float, ...]:
        """The numbers, each rounded to fp32."""
        values = getattr(self, name)
        if not isinstance(values, list | tuple) or (not values and name not in _MAY_BE_EMPTY):
            raise PolicyError(f"sparge tuning: {self.module}: {name} must be a list of numbers, got {values!r}.")
        for value in values:
            if type(value) not in (int, float) or not limits[0] <= value <= limits[1] or math.isinf(value):
                raise PolicyError(
                    f"sparge tuning: {self.module}: {name} must be finite and in {limits[0]:g} ... {limits[1]:g}, "
                    f"got {value!r}."
                )
        return tuple(torch.tensor(values, dtype=torch.float32, device="cpu").tolist())

    @property
    def params(self) -> dict[str, float | tuple[float, ...]]:
        """The thresholds as a rule's parameters; those that test nothing are left out."""
        asked = {"mass": self.mass}
        if max(self.similarity) > 0:
            asked["similarity"] = self.similarity
        if self.pv_threshold:
            asked["pv_threshold"] = self.pv_threshold
        return {name: values[0] if len(set(values)) == 1 else tuple(values) for name, values in asked.items()}


@dataclass(frozen=True)
class SpargeTuning:
    """Thresholds of `sparge`, found by `sparseattn.tune_sparge` or imported, for one model.

    Args:
        sites: a SpargeSite for each module; stored as a tuple.
        params: the parameters of `sparge` that they were found with: sink, smooth_k, pv, block_q, block_k.
        l1: bound of the error that they were found with; None if not known.
        pv_l1: bound with the second stage; None if there is none, or it is not known.
        note: what a reader should know of their origin.

    Raises:
        PolicyError: on a parameter that a tuning decides or that `sparge` has not, or a module that comes twice.

    Paper: https://arxiv.org/abs/2502.18137
    """

    sites: Sequence[SpargeSite]
    params: Mapping[str, Any] | Params = ()
    l1: float | None = None
    pv_l1: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        sites: object = self.sites
        if not isinstance(sites, list | tuple) or not all(isinstance(site, SpargeSite) for site in sites):
            raise PolicyError(f"sparge tuning: sites must be a list of SpargeSite, got {sites!r}.")
        modules = [site.module for site in self.sites]
        if twice := sorted({module for module in modules if modules.count(module) > 1}):
            raise PolicyError(f"sparge tuning: {twice[0]} comes twice. A module has one SpargeSite.")
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "params", fixed_params(self.params))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpargeTuning:
        """The tuning in a file that `save` wrote.

        Raises:
            PolicyError: if it cannot be read, is of another version, or is not valid; the message begins with the path.
        """
        from .sparge_tuning_file import load

        return load(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .json file, whole or not at all; `load` gives the same numbers, bit for bit.

        Raises:
            PolicyError: if the path does not end in .json.
        """
        from .sparge_tuning_file import save

        save(self, path)

    @classmethod
    def from_upstream(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        modules: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> SpargeTuning:
        """The thresholds that SpargeAttn's own tuning saved, by `extract_sparse_attention_state_dict`.

        Args:
            state_dict: "<path of the inner attention>.cdfthreshd" and so on, each (H,).
            modules: path of an inner attention -> path of the module that owns the attention here, with {} for every
                number: {"blocks.{}.self_attn.inner_attention": "blocks.{}.attn1"}. None takes the module that has the
                `inner_attention`.
            params: as of the constructor, {"sink": True} unless given: upstream always keeps the first block of keys.

        Raises:
            PolicyError: on a key that is unknown or missing, a tensor of a wrong shape, NaN or a number out of range,
                or a path that `modules` does not map; the message names the key.
        """
        from .sparge_upstream import read_state

        return read_state(state_dict, modules, {"sink": True} if params is None else params)

    def rules(self, *, mode: Mode = "prefer", steps: str | None = None) -> list[Rule]:
        """The rules of a policy: one for each site with a sparse head. Sites without one have none, and stay dense.

        Args:
            mode: "prefer" or "require".
            steps: range of the steps that the samples were of, as in a rule; None is all.
        """
        why = "SpargeAttention tuned" if self.l1 is None else f"SpargeAttention tuned within l1 {self.l1:g}"
        return [
            Rule(
                "sparge",
                modules=[glob.escape(site.module)],
                kind="self",
                steps=steps,
                mode=mode,
                params={**dict(self.params), **site.params},
                why=why,
            )
            for site in self.sites
            if any(site.sparse)
        ]

    @property
    def sparsity(self) -> float | None:
        """Share of the key blocks left out, mean over all heads, dense sites with them; None if not measured."""
        shares = list(chain.from_iterable(site.sparsity for site in self.sites))
        heads = sum(len(site.mass) for site in self.sites)
        return sum(shares) / heads if heads and len(shares) == heads else None

    def __str__(self) -> str:
        heads, sparse = sum(len(site.mass) for site in self.sites), sum(sum(site.sparse) for site in self.sites)
        share = "" if self.sparsity is None else f", sparsity {self.sparsity:.1%}"
        lines = [f"{len(self.sites)} layers, {sparse} of {heads} heads sparse{share}"]
        lines += [f"note: {self.note}"] if self.note else []
        return "\n".join([*lines, *(f"  {_line(site)}" for site in self.sites)])


def fixed_params(params: Mapping[str, Any] | Params) -> Params:
    """The parameters of `sparge` beside the thresholds, checked, in the normal form of a rule.

    Raises:
        PolicyError: on one that a tuning decides, or that `sparge` has not, or out of range.
    """
    checked = Rule("sparge", params=params).params
    if searched := [name for name, _ in checked if name in SEARCHED]:
        raise PolicyError(f"params: {searched[0]} is what is tuned. Remove it.")
    return checked


def _line(site: SpargeSite) -> str:
    if not any(site.sparse):
        return f"{site.module}: dense{f', {site.why}' if site.why else ''}"
    cells = [f"{site.module}: {sum(site.sparse)} of {len(site.mass)} heads sparse"]
    cells += [f"sparsity {sum(site.sparsity) / len(site.sparsity):.1%}"] if site.sparsity else []
    cells += [f"error up to {max(site.error):.3f}"] if site.error else []
    return ", ".join(cells)
