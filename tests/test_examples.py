"""The examples run as they are documented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_add_a_backend() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", EXAMPLES / "add_a_backend.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 attention site: 1 chunked" in done.stdout
    assert "200 tokens are not a multiple of the chunk, 64" in done.stdout


def test_tiny_video_data_and_checkpoint() -> None:
    code = (
        "import torch\n"
        "from model import load_model, initial_noise\n"
        "from shapes import sample_clips\n"
        "video, caption = sample_clips(2, 3, torch.Generator().manual_seed(0))\n"
        "again, _ = sample_clips(2, 3, torch.Generator().manual_seed(0))\n"
        "assert torch.equal(video, again) and video.min() >= -1 and video.max() <= 1\n"
        "noise = initial_noise(2, 3, seed=1)\n"
        "mixed = 0.5 * (video + noise)\n"
        "step = torch.full((2,), 500.0)\n"
        "velocity = load_model()(mixed, timestep=step, encoder_hidden_states=caption, return_dict=False)[0]\n"
        "error = (velocity - (noise - video)).square().mean() / (noise - video).square().mean()\n"
        "print(float(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=EXAMPLES / "tiny_video",
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.1  # a trained model explains the velocity; fresh weights give about 1


def test_finetune_sla(tmp_path: Path) -> None:
    """Two steps of one student on small batches: it measures, learns from dense, and writes what it says."""
    code = (
        "import sys, finetune_sla as example\n"
        "example.BATCH, example.HELD_OUT, example.STUDENTS = 1, 1, example.STUDENTS[:2]\n"
        f"sys.argv = ['finetune_sla', '--steps', '2', '--out', {str(tmp_path)!r}]\n"
        "example.main()\n"
        "sla, sparse = example.STUDENTS\n"
        "assert sla.switched == sparse.switched and sla.tuned != sparse.tuned\n"
        "assert all(one.tuned < one.switched and len(one.losses) == 2 for one in (sla, sparse))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=EXAMPLES
    )
    assert done.returncode == 0, done.stderr
    assert "sparse 90 %       6 / 64" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"losses.png", "contact_sheet.png", "results.json"}


def test_calibrate_wan(tmp_path: Path) -> None:
    """One frame, two calls: it calibrates, compares with a uniform ratio, and writes what it says."""
    code = (
        "import sys, calibrate_wan as example\n"
        "example.STEPS, example.EVERY, example.BUCKETS, example.SEEDS, example.HELD_OUT = 2, 1, 2, (0,), (100,)\n"
        "example._TURNS, example._TIMED, example._TRIES = 1, 1, 1\n"
        f"sys.argv = ['calibrate_wan', '--frames', '1', '--budgets', '0.05', '--out', {str(tmp_path)!r}]\n"
        "example.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=EXAMPLES
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[0] == "0.05"
    files = {"budgets_1_frames.png", "density_1_frames.png", "measured_1.pt", "wan_1_frames_0.05.toml"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_export_all(tmp_path: Path) -> None:
    """One frame, two of the formats: the files are loaded in processes of their own and agree."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", EXAMPLES / "export_all.py", "--frames", "1", "--folder", tmp_path),
            *("--formats", "torch.export", "ONNX"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "5 block_topk, 5 sdpa" in done.stdout
    assert {"model.pt2", "model.report.json", "model.onnx"} <= {path.name for path in tmp_path.iterdir()}
