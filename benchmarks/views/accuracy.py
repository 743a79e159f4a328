"""Errors that the suite `cpu` measured."""

from __future__ import annotations

from .markdown import count, fixed, percent, span, table
from .registry import Results, view


@view("quantization")
def quantization(results: Results) -> str:
    """Every rounding, on both kinds of inputs."""
    rows = results.rows("quantization")
    kinds = ("normal", "structured")
    header = ("rounding", *(f"{kind}: {measure}" for kind in kinds for measure in ("rel. L1", "cosine")))
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        errors = [results.row("quantization", name, inputs=kind).error for kind in kinds]
        lines.append((name, *(cell for e in errors for cell in (fixed(e["relative_l1"], 4), fixed(e["cosine"], 5)))))
    return table(header, lines, rows)


@view("quantization.int8")
def quantization_int8(results: Results) -> str:
    """Of INT8 with the three groups, in percent of the output's mean size."""
    names = [f"INT8 {groups}" for groups in ("per_block", "per_warp", "per_thread (the default)")]
    rows = [row for name in names for row in results.rows("quantization", name)]
    return f"{span((100 * row.error['relative_l1'] for row in rows), 1)} %"


@view("quantization.int4")
def quantization_int4(results: Results) -> str:
    """Of INT4 in plain blocks."""
    return fixed(results.row("quantization", "INT4 per_block", inputs="structured").error["relative_l1"], 3)


@view("quantization.int4.best")
def quantization_int4_best(results: Results) -> str:
    """Of INT4 in fine groups with smooth_q."""
    return fixed(results.row("quantization", "INT4 per_thread, smooth_q", inputs="structured").error["relative_l1"], 3)


@view("linear_branch")
def linear_branch(results: Results) -> str:
    """What is kept and what varies, by layer."""
    rows = results.rows("linear_branch")
    kept = [name for name in rows[0].figures if name.startswith("kept_at_")]
    parts = (*kept, "linear_varies", "exact_varies")
    header = (
        "layer",
        *(f"kept at {percent(float(name.removeprefix('kept_at_')))}" for name in kept),
        "linear",
        "exact",
    )
    return table(header, ((row.name, *(fixed(row.figures[part], 3) for part in parts)) for row in rows), rows)


@view("linear_branch.linear")
def linear_varies(results: Results) -> str:
    """How much of the linear branch varies, over the layers."""
    return f"{span((100 * row.figures['linear_varies'] for row in results.rows('linear_branch')), 1)} %"


@view("linear_branch.exact")
def exact_varies(results: Results) -> str:
    """How much of exact attention varies, over the layers."""
    return f"{span((100 * row.figures['exact_varies'] for row in results.rows('linear_branch')), 0)} %"


@view("sparge_tuning")
def sparge_tuning(results: Results) -> str:
    """What the bounds leave out, and the errors on clips it was and was not tuned on."""
    from suites.cpu.sparge_tuning import OTHERS, TUNED_ON

    rows = results.rows("sparge_tuning")
    lines = (
        (
            count(row.setting["seq"]),
            f"{row.setting['l1']:.2f}, {row.setting['pv_l1']:.2f}",
            f"{row.figures['sparse_heads']} of {row.figures['heads']}",
            percent(row.figures["sparsity"], 1),
            *(span((row.error[f"relative_l1_at_{noise:g}"] for noise in noises), 3) for noises in (TUNED_ON, OTHERS)),
            fixed(row.figures.get("seconds"), 0),
        )
        for row in rows
    )
    header = ("tokens", "`l1`, `pv_l1`", "heads sparse", "sparsity", "error, tuned on", "error, others", "seconds")
    return table(header, lines, rows)
