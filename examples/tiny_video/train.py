"""Train the tiny video model on shapes that move: flow matching, at 1,024 tokens, then up to 4,096.

    python examples/tiny_video/train.py

About three hours on two CPU cores. Interrupt it and start it again: it goes on from its last state. The checkpoint and
the log (one row per 50 steps) are written beside this file.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import CHECKPOINT, TOKENS_PER_FRAME, build_model, parameter_count, save_model, shifted
from shapes import sample_clips

STATE = CHECKPOINT.with_name("training_state.pt")
LOG = CHECKPOINT.with_name("training_log.csv")


@dataclass(frozen=True)
class Stage:
    """A run of steps at one clip length; the rate falls linearly from `rate` to `final_rate`."""

    frames: int
    most_shapes: int
    batch: int
    steps: int
    rate: float
    final_rate: float


STAGES = (
    Stage(frames=4, most_shapes=3, batch=8, steps=2200, rate=1.5e-3, final_rate=5e-4),
    Stage(frames=16, most_shapes=3, batch=2, steps=700, rate=5e-4, final_rate=2e-5),
    Stage(frames=8, most_shapes=2, batch=4, steps=700, rate=8e-4, final_rate=4e-4),
    Stage(frames=16, most_shapes=2, batch=2, steps=800, rate=4e-4, final_rate=1e-5),
)


def locate(step: int) -> tuple[Stage, float] | None:
    """The stage and learning rate of a step, or None when training is over."""
    for stage in STAGES:
        if step < stage.steps:
            rate = stage.rate + (stage.final_rate - stage.rate) * step / stage.steps
            return stage, rate
        step -= stage.steps
    return None


def loss_of(model: torch.nn.Module, stage: Stage, generator: torch.Generator) -> torch.Tensor:
    """Flow-matching loss of one fresh batch: predict noise - video from their mixture (Lipman et al. 2023)."""
    video, caption = sample_clips(stage.batch, stage.frames, generator, stage.most_shapes)
    noise = torch.randn(video.shape, generator=generator)
    mix = shifted(torch.sigmoid(torch.randn(stage.batch, generator=generator)))
    noisy = torch.lerp(video, noise, mix[:, None, None, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(noisy, timestep=mix * 1000, encoder_hidden_states=caption, return_dict=False)[0]
    return (velocity.float() - (noise - video)).square().mean()


def train(stop_after_minutes: float) -> None:
    """Run, or resume, the training."""
    torch.manual_seed(0)
    model = build_model().train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, seconds = _resume(model, average, optimizer)
    print(f"{parameter_count(model) / 1e6:.2f} million parameters, step {step}", flush=True)
    started, running = time.monotonic(), None
    while (where := locate(step)) is not None:
        stage, rate = where
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100)
        loss = loss_of(model, stage, torch.Generator().manual_seed(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        step += 1
        elapsed = seconds + time.monotonic() - started
        if step % 50 == 0:
            _log(step, stage, rate, running, elapsed)
        if step % 100 == 0 or locate(step) is None:
            _save(model, average, optimizer, step, elapsed)
        if elapsed - seconds > 60 * stop_after_minutes:
            break
    save_model(average.module, CHECKPOINT)


def _resume(model: torch.nn.Module, average: AveragedModel, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    if not STATE.exists():
        LOG.write_text("step,tokens,learning_rate,loss,seconds\n")
        return 0, 0.0
    state = torch.load(STATE)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    _forget_rows_after(state["step"])
    return state["step"], state["seconds"]


def _forget_rows_after(step: int) -> None:
    """Rows that an interrupted run logged after its last state will be logged again."""
    head, *rows = LOG.read_text().splitlines(keepends=True)
    LOG.write_text("".join([head, *(row for row in rows if int(row.split(",")[0]) <= step)]))


def _save(
    model: torch.nn.Module, average: AveragedModel, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"step": step, "seconds": seconds}, STATE)
    save_model(average.module, CHECKPOINT)


def _log(step: int, stage: Stage, rate: float, loss: float, seconds: float) -> None:
    tokens = stage.frames * TOKENS_PER_FRAME
    print(f"step {step:5d}  {tokens} tokens  loss {loss:.4f}  {seconds / 60:.1f} min", flush=True)
    with LOG.open("a", newline="") as file:
        csv.writer(file).writerow([step, tokens, f"{rate:.2e}", f"{loss:.5f}", f"{seconds:.0f}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stop-after-minutes", type=float, default=float("inf"))
    train(parser.parse_args().stop_after_minutes)
