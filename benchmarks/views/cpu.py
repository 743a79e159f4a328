"""Times that the suite `cpu` measured."""

from __future__ import annotations

from .markdown import count, fixed, milliseconds, percent, power, rate, short, span, table
from .registry import Results, view
from harness.record import Row

_FORWARD = ("ms (quartiles)", "dense ms", "density", "efficiency", "GFLOP/s", "dense-equivalent", "of torch.mm")


def _forward(row: Row) -> tuple[str, ...]:
    return (
        milliseconds(row.time),
        short(row.dense.ms if row.dense else None),
        fixed(row.density, 3),
        fixed(row.efficiency, 2),
        rate(row.rates.get("executed")),
        rate(row.rates.get("dense_equivalent")),
        percent(row.of_matmul),
    )


@view("block_sparse")
def block_sparse(results: Results) -> str:
    """The rows of two threads and blocks of 64, for the README."""
    rows = results.rows("block_sparse", threads=2, block=64)
    return _block_sparse(rows)


@view("block_sparse.all")
def block_sparse_all(results: Results) -> str:
    """All rows."""
    return _block_sparse(results.rows("block_sparse"))


def _block_sparse(rows: list[Row]) -> str:
    header = ("dtype", "tokens", "dim", "heads", "block", "threads", *_FORWARD, "rel. L1", "lse")
    lines = (
        (
            *(count(row.setting[name]) for name in ("dtype", "seq", "dim", "heads", "block", "threads")),
            *_forward(row),
            power(row.error.get("relative_l1")),
            power(row.error.get("lse_max")),
        )
        for row in rows
    )
    return table(header, lines, rows)


@view("methods")
def methods(results: Results) -> str:
    """Every method and density in fp32."""
    return _methods(results.rows("methods", dtype="fp32"))


@view("methods.bf16")
def methods_bf16(results: Results) -> str:
    """Likewise in bf16."""
    return _methods(results.rows("methods", dtype="bf16"))


def _methods(rows: list[Row]) -> str:
    header = (
        "method",
        "density",
        "ms (quartiles)",
        "times dense",
        "efficiency",
        "of torch.mm",
        "rel. L1",
        "cosine",
        "MiB",
    )
    lines = (
        (
            row.name,
            fixed(row.density, 3),
            milliseconds(row.time),
            fixed(row.speed, 2),
            fixed(row.efficiency, 2),
            percent(row.of_matmul),
            fixed(row.error.get("relative_l1"), 3),
            fixed(row.error.get("cosine"), 4),
            fixed(row.figures.get("added_mib"), 0),
        )
        for row in rows
    )
    return table(header, lines, rows)


@view("methods.mass")
def mass(results: Results) -> str:
    """How sparse the attention of the inputs is."""
    figures = results.row("methods", "dense", dtype="fp32").figures
    held = {float(name.removeprefix("mass_of_best_")): value for name, value in figures.items() if "mass_of" in name}
    return ", ".join(f"{percent(value)} in the best {percent(part)}" for part, value in held.items())


@view("training")
def training(results: Results) -> str:
    """Efficiency of forward and backward, and of the backward, by kernel, dtype and density."""
    rows = results.rows("training")
    header = ("kernel", "dtype", "direction", "tokens", *_FORWARD, "dq", "dk", "dv")
    lines = (
        (
            str(row.setting["kernel"]),
            str(row.setting["dtype"]),
            row.name,
            count(row.setting["seq"]),
            *_forward(row),
            *(power(row.error.get(f"{name}_relative_l2")) for name in ("dq", "dk", "dv")),
        )
        for row in rows
    )
    return table(header, lines, rows, words=3)


@view("sage")
def sage(results: Results) -> str:
    """INT8 beside dense attention."""
    rows = results.rows("sage")
    lines = (
        (
            *(count(row.setting[name]) for name in ("dtype", "seq", "dim", "threads")),
            milliseconds(row.time),
            short(row.dense.ms if row.dense else None),
            fixed(row.speed, 2),
            fixed(row.error.get("relative_l1"), 4),
        )
        for row in rows
    )
    return table(
        ("dtype", "tokens", "dim", "threads", "ms (quartiles)", "dense ms", "times dense", "rel. L1"), lines, rows
    )


@view("overhead")
def overhead(results: Results) -> str:
    """Microseconds of a call, by shape and op."""
    rows = results.rows("overhead")
    names = list(dict.fromkeys(row.name for row in rows))
    shapes = list(dict.fromkeys(tuple(row.setting.values()) for row in rows))
    taken = {(tuple(row.setting.values()), row.name): row.time for row in rows}
    lines = (
        ("(" + ", ".join(map(str, shape)) + ")", *(fixed(1e3 * taken[shape, name].ms, 1) for name in names))
        for shape in shapes
    )
    return table(("B, H, S, D", *names), lines, rows)


@view("onnx")
def onnx(results: Results) -> str:
    """Sparse and dense models in onnxruntime, on one and two threads."""
    rows = results.rows("onnx")
    one, two = ([row for row in rows if row.setting["threads"] == number] for number in (1, 2))
    header = (
        "head_dim",
        "model",
        "ms, 1 thread",
        "times dense",
        "ms, 2 threads",
        "times dense",
        "MiB of the run",
        "error",
    )
    lines = (
        (
            str(single.setting["dim"]),
            single.name.replace("Attention", "`Attention`") if "dense" in single.name else f"`{single.name}`",
            milliseconds(single.time),
            fixed(single.speed, 1),
            milliseconds(double.time),
            fixed(double.speed, 1),
            fixed(double.figures.get("run_mib"), 0),
            power(double.error.get("relative_l2")),
        )
        for single in one
        for double in two
        if (single.name, single.setting["dim"]) == (double.name, double.setting["dim"])
    )
    return table(header, lines, rows, words=2)


def _onnx_sparse(results: Results) -> list[Row]:
    return [row for row in results.rows("onnx") if not row.name.startswith("dense")]


@view("onnx.speed.1")
def onnx_speed_1(results: Results) -> str:
    """Times faster than dense on one thread."""
    return span((row.speed for row in _onnx_sparse(results) if row.setting["threads"] == 1), 1)


@view("onnx.speed.2")
def onnx_speed_2(results: Results) -> str:
    """Times faster than dense on two threads."""
    return span((row.speed for row in _onnx_sparse(results) if row.setting["threads"] == 2), 1)


@view("onnx.memory")
def onnx_memory(results: Results) -> str:
    """Memory of a run as a part of that of dense."""
    parts = []
    for row in _onnx_sparse(results):
        dense = results.row("onnx", "dense, Attention", dim=row.setting["dim"], threads=row.setting["threads"])
        parts.append(100 * row.figures["run_mib"] / dense.figures["run_mib"])
    return f"{span(parts, 0)} %"


@view("explain_full_size")
def explain_full_size(results: Results) -> str:
    """Time and memory to decide for full-size models."""
    rows = results.rows("explain_full_size")
    lines = (
        (
            row.name,
            str(row.figures["sites"]),
            fixed(row.figures["seconds"], 1),
            fixed(row.figures["cpu_seconds"], 1),
            fixed(row.figures["peak_gib"], 2),
        )
        for row in rows
    )
    return table(("model", "sites", "seconds", "of CPU", "peak GiB"), lines, rows)
