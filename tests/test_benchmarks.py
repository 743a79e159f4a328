"""The harness of benchmarks/: its clocks, records and pages; and that no page says what the raw files do not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"

Import = Callable[[str], ModuleType]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports a module of benchmarks/, as its scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


class FakeClock:
    """Every call takes what it says."""

    name = "fake"

    def milliseconds(self, call: Callable[[], Any]) -> float:
        return float(call() or 0.0)


def test_pages_and_pictures_are_what_the_raw_files_say(bench: Import) -> None:
    for path, text in bench("tables").generated():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs; run: python benchmarks/tables.py"


def test_the_folder_of_results_is_read(bench: Import) -> None:
    rows = bench("harness.record").newest(BENCHMARKS / "results")
    assert {"block_sparse", "methods", "training", "onnx"} <= set(rows)
    assert all(row.stamp and row.stamp.device and row.stamp.commit for case in rows.values() for row in case)


@pytest.mark.parametrize(
    "page",
    [
        "a <!-- bench: x -->1 b",
        "a <!-- bench: x -->1<!-- bench: y -->2<!-- /bench --> b",
        "a 1<!-- /bench --> b",
        "<!-- bench: x -->1<!-- /bench --> begins a line",
    ],
)
def test_pages_with_wrong_markers_are_refused(bench: Import, page: str) -> None:
    with pytest.raises(ValueError, match=r"marker|needs|line"):
        bench("harness.pages").fill(f"first\n{page}\n", lambda name: "1")


def test_a_table_does_not_go_into_a_sentence(bench: Import) -> None:
    with pytest.raises(ValueError, match="lines of their own"):
        bench("harness.pages").fill("a <!-- bench: x -->1<!-- /bench -->", lambda name: "| a |\n| b |")


def test_filling_a_page_twice_changes_nothing(bench: Import) -> None:
    pages = bench("harness.pages")
    page = "so <!-- bench: x -->?<!-- /bench --> and\n<!-- bench: y -->\nold\n<!-- /bench -->\n"
    once = pages.fill(page, {"x": "1", "y": "| a |\n| b |"}.__getitem__)
    assert once == "so <!-- bench: x -->1<!-- /bench --> and\n<!-- bench: y -->\n| a |\n| b |\n<!-- /bench -->\n"
    assert pages.fill(once, {"x": "1", "y": "| a |\n| b |"}.__getitem__) == once


def test_a_view_without_rows_says_so_and_an_unknown_name_is_an_error(bench: Import, tmp_path: Path) -> None:
    tables = bench("tables")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("It is <!-- bench: onnx.speed.1 --><!-- /bench --> times as fast.")
    (_, text), *_ = tables.generated(tmp_path, tmp_path)  # behind the page there are pictures of what needs no rows
    assert text == f"It is <!-- bench: onnx.speed.1 -->{tables.NOT_MEASURED}<!-- /bench --> times as fast."
    (tmp_path / "README.md").write_text("It is <!-- bench: onnx.spede.1 --><!-- /bench -->.")
    with pytest.raises(ValueError, match=r"no view 'onnx\.spede\.1'"):
        list(tables.generated(tmp_path, tmp_path))


def test_rows_survive_their_file(bench: Import, tmp_path: Path) -> None:
    record, machine = bench("harness.record"), bench("harness.machine")
    stamp = machine.Stamp("a CPU", {"torch": "2"}, "abc", "2026-01-01T00:00:00+00:00")
    time = record.Timing(2.0, 1.5, 2.5, 5, "fake")
    dense = record.Timing(8.0, clock="fake")
    row = record.Row(
        "c", "ours", {"seq": 64}, 0.25, time, dense, {"executed": 3e9, "torch.mm": 6e9}, {"relative_l1": 1e-3}
    )
    missing = record.Row("c", "theirs", missing="not installed")
    record.write(tmp_path / "r.jsonl", [row, missing], stamp)
    again, gone = record.read(tmp_path / "r.jsonl")
    assert (again.speed, again.efficiency, again.of_matmul) == (4.0, 1.0, 0.5)
    assert again.time == time
    assert again.stamp == stamp
    assert gone.missing == "not installed"
    assert gone.time is gone.speed is gone.density is None
    # What is not known is not in the file.
    assert set(json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])) == {"case", "name", "missing", "stamp"}


def test_the_newest_rows_of_a_case_win(bench: Import, tmp_path: Path) -> None:
    record, machine = bench("harness.record"), bench("harness.machine")
    for file, date, names in (("a", "2026-01-02", ["new"]), ("b", "2026-01-01", ["old", "older"])):
        stamp = machine.Stamp("a CPU", {"torch": "2"}, "abc", f"{date}T00:00:00+00:00")
        record.write(tmp_path / f"{file}.jsonl", [record.Row("c", name) for name in names], stamp)
    assert [row.name for row in record.newest(tmp_path)["c"]] == ["new"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_no_figure(bench: Import, value: float) -> None:
    record = bench("harness.record")
    with pytest.raises(ValueError, match="finite"):
        record.to_line(record.Row("c", "n", figures={"x": value}))


def test_calls_take_turns_and_the_first_is_not_counted(bench: Import) -> None:
    turns: list[str] = []
    times = {"a": iter([99.0, 1.0, 2.0, 3.0, 4.0, 5.0]), "b": iter([99.0, 10.0, 10.0, 10.0, 10.0, 10.0])}
    calls = {name: lambda name=name: (turns.append(name), next(times[name]))[1] for name in times}
    timed = bench("harness.clock").interleaved(calls, 5, FakeClock())
    assert turns == ["a", "b"] * 6
    assert (timed["a"].low, timed["a"].ms, timed["a"].high, timed["a"].repeats) == (2.0, 3.0, 4.0, 5)
    assert timed["b"].ms == 10.0


def test_a_budget_that_is_spent_leaves_three_turns(bench: Import) -> None:
    clock = bench("harness.clock")
    now = iter(range(0, 10**6, 60))
    budget = clock.Budget(50.0, lambda: float(next(now)))
    assert clock.interleaved({"a": lambda: 1.0}, 50, FakeClock(), budget=budget)["a"].repeats == 3


def test_one_thread_is_timed_in_its_own_time(bench: Import) -> None:
    before = torch.get_num_threads()
    try:
        for threads, name in ((1, "thread CPU time"), (2, "wall clock")):
            torch.set_num_threads(threads)
            assert bench("harness.clock").HostClock().name == name
    finally:
        torch.set_num_threads(before)


def contest(bench: Import, **contenders: Callable[[], Callable[[], float]]) -> dict[str, Any]:
    """The rows by name; a call gives its error, and takes as many milliseconds as 1000 times that."""
    harness = bench("harness.contest")
    made = harness.Contest(
        "c", {}, 1e9, contenders, {"dense": lambda: lambda: 0.004}, 0.5, lambda got: {"relative_l2": got}, device="cpu"
    )
    rows = harness.compete(made, 3, FakeClock(), bench("harness.clock").Budget())
    return {row.name: row for row in rows}


def test_only_what_is_right_is_timed(bench: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench("harness.contest"), "matmul", lambda dtype, device: lambda: 1.0)

    def lacks() -> Callable[[], float]:
        raise bench("harness.contest").MissingError("pip install it")

    def broken() -> Callable[[], float]:
        raise RuntimeError("it\nbroke")

    rows = contest(
        bench,
        right=lambda: lambda: 0.001,
        wrong=lambda: lambda: 0.5,
        nan=lambda: lambda: float("nan"),
        lacks=lacks,
        broken=broken,
    )
    assert rows["right"].missing is None
    assert rows["right"].speed == 4.0
    assert rows["right"].efficiency == 2.0
    assert rows["wrong"].missing == "wrong: relative L2 error 5.0e-01, at most 0.02 is right"
    assert "wrong" in rows["nan"].missing
    assert rows["lacks"].missing == "pip install it"
    assert rows["broken"].missing == "RuntimeError: it broke"
    assert all(row.time is None and not row.rates for row in rows.values() if row.missing)


def test_a_contest_without_seconds_times_nothing(bench: Import) -> None:
    harness, clock = bench("harness.contest"), bench("harness.clock")
    made = harness.Contest("c", {}, 1e9, {"ours": lambda: lambda: 1.0}, device="cpu")
    (row,) = harness.compete(made, 3, FakeClock(), clock.Budget(0.0))
    assert "seconds were spent" in row.missing


@pytest.mark.parametrize("suite", ["gpu", "peers"])
def test_a_suite_for_a_gpu_stays_below_nine_minutes_and_says_when_there_is_none(bench: Import, suite: str) -> None:
    cases = bench("suites").cases(suite)
    assert sum(case.full.seconds for case in cases) <= 520
    if not torch.cuda.is_available():
        assert {case.why_not() for case in cases} == {"needs a CUDA device"}


def test_the_workloads_of_the_gpu_suite_are_the_published_ones(bench: Import) -> None:
    full = {case.name: case.full for case in bench("suites").cases("gpu")}
    headline = full["gpu.block_sparse"]
    assert (headline.heads, headline.seq, headline.dim, headline.keep) == (12, 49152, 128, 76)
    assert full["gpu.sla"].shape == (2, 16, 32760, 128)
    assert full["gpu.sla"].sparsity == 0.95
    assert full["gpu.sage"].shape == (4, 32, 32768, 128)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_workload_of_the_gpu_suite_runs_on_a_cpu(bench: Import, direction: str) -> None:
    """The whole path with tiny sizes, the CPU's provider, and one that is not there."""
    workload = bench("suites.gpu.workload")
    tiny = workload.Workload("w", 256, 2, 32, 2, direction=direction, device="cpu")
    budget = bench("harness.clock").Budget()
    rows = {row.name: row for row in workload.measure(tiny, 1, budget, providers=("cpu", "triton"))}
    assert rows["cpu"].time
    assert rows["cpu"].density == 0.5
    assert rows["SDPA"].density == 1.0
    assert "triton" in rows["triton"].missing
    if direction == "forward":
        assert rows["cpu"].error["relative_l2"] < 1e-2
    products = {"forward": 2, "backward": 5}[direction]
    assert rows["cpu"].rates["dense_equivalent"] == pytest.approx(
        2 * products * 2 * 256**2 * 32 / (1e-3 * rows["cpu"].time.ms)
    )


def test_a_sampled_error_is_that_of_the_rows(bench: Import) -> None:
    error, inputs = bench("harness.error"), bench("harness.inputs")
    torch.manual_seed(0)
    qkv = inputs.normal((2, 3, 200, 32), torch.float32)
    lists = inputs.random_lists(3, 200, (64, 32), density=0.5)
    exact = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=lists.token_mask())
    assert error.sampled_distance(exact, qkv, lists, blocks=4)["relative_l2"] < 1e-6
    assert error.sampled_distance(1.01 * exact, qkv, lists, blocks=4)["relative_l2"] == pytest.approx(0.01, rel=1e-3)
    dense = torch.nn.functional.scaled_dot_product_attention(*qkv)
    assert error.sampled_distance(dense, qkv, None)["relative_l2"] < 1e-6


def test_it_runs_from_a_source_tree_where_nothing_is_installed() -> None:
    code = (
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('sparseattn') is None\n"
        "import harness, sparseattn\n"
        "from sparseattn.attn_ops.backends.block_sparse import BACKEND\n"
        "print(sparseattn.__file__, sparseattn.backends()['block_sparse'] is BACKEND)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout.split() == [str(ROOT / "__init__.py"), "True"], done.stderr


def test_every_case_has_a_name_of_its_own(bench: Import) -> None:
    names = [case.name for suite in bench("suites").SUITES for case in bench("suites").cases(suite)]
    assert len(names) == len(set(names))


def test_a_case_runs_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", BENCHMARKS / "run.py", "cpu", "--quick", "--only", "block_sparse"),
            *("--out", out, "--seq", "192"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = out.read_text().splitlines()
    row = json.loads(line)
    assert row["setting"]["seq"] == 192
    assert row["time"]["clock"] == "thread CPU time"
    assert row["error"]["relative_l1"] < 1e-5
    assert row["stamp"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["overhead", "sage", "quantization", "methods"])
def test_a_case_of_the_cpu_suite_runs(bench: Import, tmp_path: Path, name: str) -> None:
    """Those that take a second; `make bench-quick` runs all."""
    out = tmp_path / "r.jsonl"
    assert bench("run").main(["cpu", "--quick", "--only", name, "--out", str(out)]) == 0
    rows = bench("harness.record").read(out)
    assert rows
    assert all((row.time or row.error) and not row.missing for row in rows)


@pytest.mark.parametrize(("flags", "kept"), [((), True), (("--seq", "192"), False), (("--quick",), False)])
def test_only_published_settings_go_to_the_results(bench: Import, flags: tuple[str, ...], kept: bool) -> None:
    run = bench("run")
    options, chosen = run._options(["cpu", "--only", "block_sparse", *flags])
    path = run._file(options, chosen, bench("harness.machine").take_stamp())
    assert (path.parent == run.RESULTS) is kept


def test_a_case_that_fails_leaves_no_rows_and_the_others_go_on(
    bench: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, record, case = bench("run"), bench("harness.record"), bench("harness.case")

    def fails(settings: None) -> Iterator[Any]:
        yield record.Row("bad", "half")
        raise RuntimeError("out of luck")

    def works(settings: None) -> Iterator[Any]:
        yield record.Row("good", "whole")

    cases = tuple(case.Case(name, of, None, None) for name, of in (("bad", fails), ("good", works)))
    monkeypatch.setattr(run, "cases", lambda suite: cases)
    monkeypatch.setattr(run, "with_flags", lambda settings, options: settings)
    assert run.main(["cpu", "--out", str(tmp_path / "r.jsonl")]) == 1
    assert [row.name for row in record.read(tmp_path / "r.jsonl")] == ["whole"]
    assert "failed: bad" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("cpu", "--only", "block_spares"), "no case 'block_spares' in cpu"),
        (("cpu", "--quick", "--out", str(BENCHMARKS / "results" / "x.jsonl")), "do not belong in results"),
        (("tpu",), "invalid choice"),
        (("cpu", "--seq", "8"), "unrecognized arguments"),
    ],
)
def test_mistakes_are_named(
    bench: Import, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench("run").main(arguments)
    assert told in capsys.readouterr().err
