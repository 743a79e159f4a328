"""What the suite `examples` measured."""

from __future__ import annotations

from .markdown import UNKNOWN, count, fixed, milliseconds, percent, power, short, span, table
from .registry import Results, view
from harness.record import Row


@view("demo")
def demo(results: Results) -> str:
    """One clip, dense and under three policies."""
    rows = results.rows("demo")
    dense = rows[0].figures["attention_ms"]
    lines = (
        (
            row.name,
            milliseconds(row.time),
            fixed(row.figures["total_seconds"], 1),
            fixed(row.speed, 2),
            short(row.figures["attention_ms"]),
            fixed(dense / row.figures["attention_ms"], 2),
            _likeness(row),
        )
        for row in rows
    )
    header = ("run", "ms per step (quartiles)", "total s", "times dense", "attention ms", "times dense", "PSNR dB")
    return table(header, lines, rows)


def _likeness(row: Row) -> str:
    if row.name == "dense":
        return UNKNOWN
    return "the same clip" if row.figures["same_clip"] else fixed(row.figures["psnr_db"], 1)


@view("finetune")
def finetune(results: Results) -> str:
    """Losses before and after."""
    rows = results.rows("finetune")
    blocks = rows[0].setting["blocks"]
    lines = [("dense", f"{blocks} / {blocks}", fixed(rows[0].figures["loss"], 4), "", "")]
    lines += [
        (
            row.name,
            f"{row.figures['blocks_kept']} / {blocks}",
            fixed(row.figures["after_switch"], 4),
            fixed(row.figures["fine_tuned"], 4),
            percent(row.figures["gap_closed"]),
        )
        for row in rows[1:]
    ]
    return table(("attention", "blocks kept", "after switch", "fine-tuned", "gap closed"), lines, rows)


@view("finetune.minutes")
def finetune_minutes(results: Results) -> str:
    """How long it took."""
    return fixed(results.row("finetune", "dense").figures["minutes"], 0)


@view("finetune.closed")
def finetune_closed(results: Results) -> str:
    """What SLA closes of the gap."""
    return percent(results.row("finetune", "SLA 90 %").figures["gap_closed"])


@view("finetune.branch")
def finetune_branch(results: Results) -> str:
    """What the linear branch changes of the error after fine-tuning."""
    sla, sparse = (results.row("finetune", name).figures["fine_tuned"] for name in ("SLA 90 %", "sparse 90 %"))
    return f"{100 * (sla / sparse - 1):+.2f} %"


@view("finetune.sparser")
def finetune_sparser(results: Results) -> str:
    """The errors with fewer blocks, in times that at 90 %."""
    errors = [results.row("finetune", f"sparse {part} %").figures["fine_tuned"] for part in (90, 95, 97)]
    return " and ".join(fixed(error / errors[0], 1) for error in errors[1:])


def _calibrate(results: Results, seq: int) -> str:
    rows = results.rows("calibrate", seq=seq)
    lines = (
        (
            f"{row.setting['budget']:g}",
            fixed(row.error["relative_l2"], 4),
            fixed(row.density, 2),
            fixed(row.figures["predicted_speed"], 2),
            fixed(row.figures["speed"], 2),
            fixed(row.figures["uniform_ratio"], 2),
            fixed(row.figures["uniform_speed"], 2),
            fixed(row.figures["uniform_relative_l2"], 4),
            fixed(row.figures["uniform_relative_l2"] / row.error["relative_l2"], 2),
        )
        for row in rows
    )
    header = ("budget", "error", "density", "predicted", "speed", "uniform", "its speed", "its error", "error ratio")
    return table(header, lines, rows)


@view("calibrate.4096")
def calibrate_4096(results: Results) -> str:
    """16 frames."""
    return _calibrate(results, 4096)


@view("calibrate.2048")
def calibrate_2048(results: Results) -> str:
    """8 frames."""
    return _calibrate(results, 2048)


@view("calibrate.2048.gain")
def calibrate_gain(results: Results) -> str:
    """How many times smaller the errors of 8 frames are at equal time."""
    rows = results.rows("calibrate", seq=2048)
    return span((row.figures["uniform_relative_l2"] / row.error["relative_l2"] for row in rows), 1)


@view("calibrate.unseen")
def calibrate_unseen(results: Results) -> str:
    """The largest error on unseen clips, in times the budget."""
    rows = results.rows("calibrate")
    return fixed(max(row.error["relative_l2"] / row.setting["budget"] for row in rows), 1)


@view("export")
def export(results: Results) -> str:
    """Three formats."""
    rows = results.rows("export")
    lines = (
        (
            row.name,
            fixed(row.figures["mib"], 1),
            fixed(row.figures["make_seconds"], 1),
            fixed(row.figures["load_seconds"], 1),
            milliseconds(row.time),
            power(row.error["relative_l2"]),
        )
        for row in rows
    )
    return table(("format", "MiB", "make s", "load s", "run ms", "error"), lines, rows)


@view("cpp_runner")
def cpp_runner(results: Results) -> str:
    """One layer in C++ and Python, and the files it takes."""
    rows = results.rows("cpp_runner")
    files, runs = rows[0].figures, rows[1:]
    lines = [(row.name, milliseconds(row.time), fixed(row.speed, 2)) for row in runs]
    made = ", ".join(
        f"{name.replace('_', ' ')} {fixed(files[f'{name}_mb'], 1)} MB in {fixed(files[f'{name}_seconds'], 0)} s"
        for name in ("package", "op_library", "runner")
    )
    setting = rows[0].setting
    told = f"{count(setting['seq'])} tokens, {setting['heads']} heads of {setting['dim']} channels, {setting['dtype']}"
    difference = f"largest difference between C++ and Python: {power(runs[0].error['largest'])}"
    runs_table = table(("run", "ms", "times dense"), lines, rows)
    return f"{runs_table}\n\n{told}, threads: {setting['threads']}; {made}; {difference}."
