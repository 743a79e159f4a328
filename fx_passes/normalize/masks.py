"""masks: prove that a mask is a flag: nothing hidden, causal, or a causal sliding window.

    read:  mask = (arange(S)[None, :] <= arange(S)[:, None]).expand(B, 1, S, S)
    as:    MaskFact(causal=True)

A mask that depends on sizes alone is computed on CPU and compared, completely; with symbolic sizes at several of them,
on both sides of every number that appears in its making. What cannot be compared completely is not claimed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from .graph import Size, is_plain, value_of
from .recipe import Assignment, Recipe, Symbol, concrete, read_recipe

HIDES = float(torch.finfo(torch.float16).min)  # no score comes near it, so with a visible key in the row it means -inf
_MOST_ENTRIES = 64 * 2**20
_SIZES = (2, 3, 5, 16, 17, 31, 64, 65, 127, 128, 129)
_BATCHES = (2, 3)
_FEW = 1024  # tokens; longer masks are compared at one length for each number
_known: weakref.WeakKeyDictionary[fx.Node, dict[tuple[object, ...], MaskFact | None]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class MaskFact:
    """What a mask says: query i sees keys 0 ... i if `causal`, i - window + 1 ... i if it has a `window`, else all."""

    causal: bool
    window: int | None = None


def prove_mask(node: fx.Node, seq_q: Size, seq_k: Size, *, hidden: bool = False) -> MaskFact | None:
    """Prove what a mask is; None if that cannot be done.

    Args:
        node: a mask that broadcasts to (B, H, Sq, Sk), bool (True is visible) or float (0 is visible; hidden is -inf,
            or -65504 or less in a row that has a visible key).
        seq_q: Sq.
        seq_k: Sk.
        hidden: the mask is bool and True is hidden.
    """
    value = value_of(node)
    if not is_plain(value) or value.dim() < 2:
        return None
    facts = _known.setdefault(node, {})
    key = (_hint(seq_q), _hint(seq_k), hidden)
    if key not in facts:
        facts[key] = _prove(node, value, key[:2], hidden)
    return facts[key]


def _hint(size: Size) -> int | None:
    return size if isinstance(size, int) else size.node.hint


def _prove(node: fx.Node, value: Tensor, sizes: tuple[int | None, int | None], hidden: bool) -> MaskFact | None:
    recipe = read_recipe(node)
    if recipe is None:
        return None
    full = tuple(map(_hint, value.shape[-2:])) == sizes
    facts: list[_Seen] = []
    for assignment in _assignments(recipe, value):
        if math.prod(concrete(tuple(value.shape), assignment)) > _MOST_ENTRIES:
            return None
        mask = recipe.evaluate(assignment)
        seen = None if mask is None else _see(~mask if hidden else mask, full)
        if seen is None:
            return None
        facts.append(seen)
    return _agree(facts)


@dataclass(frozen=True)
class _Seen:
    """What a mask is at one size, where it can be several things."""

    all_visible: bool
    causal: bool
    window: int | None
    rows: int


def _see(mask: Tensor, full: bool) -> _Seen | None:
    """Recognise one concrete mask; None if it has none of the forms. Without `full` its rows or columns broadcast."""
    visible = mask if mask.dtype == torch.bool else _visible(mask)
    if visible is None:
        return None
    if bool(visible.all()):
        return _Seen(True, full and visible.shape[-1] == 1, None, visible.shape[-2])
    return _see_triangle(visible) if full else None


def _visible(mask: Tensor) -> Tensor | None:
    if not mask.is_floating_point():
        return None
    visible, hidden = mask == 0, mask <= HIDES
    if not bool((visible | hidden).all()):
        return None
    endless = bool(((mask == float("-inf")) | visible).all())
    return visible if endless or bool(visible.any(-1).all()) else None


def _see_triangle(visible: Tensor) -> _Seen | None:
    first = visible[(0,) * (visible.dim() - 2)]
    rows, columns = first.shape
    causal = torch.ones(rows, columns, dtype=torch.bool).tril()
    window = None
    if not torch.equal(first, causal):
        window = int(first[:, 0].sum())  # rows that see the first key
        if window == 0 or not torch.equal(first, causal.triu(1 - window)):
            return None
    return _Seen(False, True, window, rows) if bool((visible == first).all()) else None


def _agree(facts: list[_Seen]) -> MaskFact | None:
    """Find what holds at every size: a window shows where there are more queries than it is long, and only there."""
    if all(seen.all_visible for seen in facts):
        return MaskFact(causal=False)
    if not all(seen.causal for seen in facts):
        return None
    windows = {seen.window for seen in facts if seen.window is not None}
    if not windows:
        return MaskFact(causal=True)
    window = windows.pop()
    unseen = (seen.rows for seen in facts if seen.window is None)
    return None if windows or any(rows > window for rows in unseen) else MaskFact(causal=True, window=window)


def _assignments(recipe: Recipe, value: Tensor) -> Iterator[Assignment]:
    """Sizes to try: one for a static mask, else lengths around every number of the recipe, equal and unequal."""
    tokens = [symbol for symbol in recipe.symbols if symbol in _free_symbols(value.shape[-2:])]
    others = [symbol for symbol in recipe.symbols if symbol not in tokens]
    lengths = sorted({length for symbol in tokens for length in _lengths(recipe, recipe.symbols[symbol])}) or [0]
    for count, (length, other) in enumerate(zip(lengths, (*lengths[1:], lengths[0]), strict=True)):
        for pair in dict.fromkeys(((length, length), (length, other), (other, length))):
            chosen = {symbol: pair[place % 2] for place, symbol in enumerate(tokens)}
            chosen |= {symbol: _BATCHES[(count + place) % 2] for place, symbol in enumerate(others)}
            if all(_within(size, recipe.symbols[symbol]) for symbol, size in chosen.items()):
                yield {symbol: sympy.Integer(size) for symbol, size in chosen.items()}


def _free_symbols(shape: tuple[Size, ...]) -> set[sympy.Basic]:
    return {symbol for size in shape if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def _lengths(recipe: Recipe, symbol: Symbol) -> set[int]:
    lengths = {*_SIZES, symbol.low, symbol.low + 1}
    if symbol.hint is not None and symbol.hint**2 <= _MOST_ENTRIES // 4:
        lengths.add(symbol.hint)
    for number in recipe.numbers:
        lengths |= {number + 2} if number > _FEW else {*range(number - 1, number + 3), 2 * number + 1}
    return {length for length in lengths if length > 0 and _within(length, symbol)}


def _within(size: int, symbol: Symbol) -> bool:
    return symbol.low <= size and (symbol.high is None or size <= symbol.high)
