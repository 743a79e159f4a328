"""Switch the tiny video model to SLA at 90 % sparsity, fine-tune it, and compare with sparse attention alone.

    python examples/finetune_sla.py

The teacher is the model itself with dense attention: a student sees noisy clips and learns the teacher's velocities.
Every student starts from the same weights and gets the same clips for as many steps; SLA has the projections of its
linear branch, zero at first, which `sparseattn.convert` puts into the model, the others have nothing but the kept
blocks. The error is the flow-matching loss on clips nobody trained on. A table, the loss curves and a contact sheet of
generated clips; 11 to 13 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).with_name("tiny_video")))

from diffusers import FlowMatchEulerDiscreteScheduler

import sparseattn
from sparseattn import Policy, Rule

from model import NOISE_SHIFT, TOKENS_PER_FRAME, initial_noise, load_model, shifted
from shapes import sample_captions, sample_clips
from sheet import contact_sheet

FRAMES, BLOCK, BATCH = 4, 16, 8
HELD_OUT = 6  # batches
RATE, PROJECTION_FACTOR, WARM_UP = 6e-4, 5, 5  # zero projections have further to go
DENSE = "dense"


@dataclass
class Student:
    """One way to make the model sparse, and what came of it."""

    name: str
    sparsity: float
    linear_branch: bool
    switched: float = 0.0
    tuned: float = 0.0
    losses: list[float] = field(default_factory=list)
    clips: dict[str, Tensor] = field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        """The policy: SLA's choice of blocks in every self-attention."""
        params = {"sparsity": self.sparsity, "block_q": BLOCK, "block_k": BLOCK}
        return Policy([Rule("sla", kind="self", params=params)])


STUDENTS = (
    Student("SLA 90 %", 0.90, True),
    Student("sparse 90 %", 0.90, False),
    Student("sparse 95 %", 0.95, False),
    Student("sparse 97 %", 0.97, False),
)


class Batch(NamedTuple):
    """Noisy clips (B, 3, T, H, W), their times (B,) in 0 ... 1000, captions, and the velocities to predict."""

    noisy: Tensor
    time: Tensor
    caption: Tensor
    velocity: Tensor


Model = Callable[..., tuple[Tensor]]


def predict(model: Model, noisy: Tensor, time: Tensor, caption: Tensor) -> Tensor:
    """The model's velocities, computed in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(noisy, timestep=time, encoder_hidden_states=caption, return_dict=False)[0].float()


def sample_batch(seed: int) -> Batch:
    """Clips of shapes that move, mixed with noise, and the velocities from the clips to the noise."""
    generator = torch.Generator().manual_seed(seed)
    video, caption = sample_clips(BATCH, FRAMES, generator, most=2)
    noise = torch.randn(video.shape, generator=generator)
    mix = shifted(torch.sigmoid(torch.randn(BATCH, generator=generator)))
    return Batch(torch.lerp(video, noise, mix.view(-1, 1, 1, 1, 1)), mix * 1000, caption, noise - video)


@torch.no_grad()
def taught(teacher: Model, steps: int, seed: int) -> list[Batch]:
    """The training clips, with the teacher's velocities."""
    batches = (sample_batch(seed + step) for step in range(steps))
    return [
        Batch(*batch[:3], predict(teacher, *batch[:3]))
        for batch in tqdm(batches, total=steps, desc=f"{'teacher':<12}", unit="step")
    ]


def loss_of(model: Model, batch: Batch) -> Tensor:
    """Mean squared error of the velocities."""
    return (predict(model, *batch[:3]) - batch.velocity).square().mean()


@torch.no_grad()
def error_of(model: Model, seed: int) -> float:
    """Flow-matching loss on clips that are not trained on."""
    losses = [loss_of(model, sample_batch(seed + 10**6 + i)).item() for i in range(HELD_OUT)]
    return sum(losses) / len(losses)


@torch.no_grad()
def generate(model: Model, seed: int, steps: int = 20) -> Tensor:
    """A clip from noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=NOISE_SHIFT)
    scheduler.set_timesteps(steps)
    caption = sample_captions(1, torch.Generator().manual_seed(seed), most=2)
    clip = initial_noise(1, FRAMES, seed)
    for time in scheduler.timesteps:
        clip = scheduler.step(predict(model, clip, time[None], caption), time, clip).prev_sample
    return clip


def tune(student: Student, batches: list[Batch], seed: int) -> None:
    """Switch a copy of the model, measure, fine-tune, measure again."""
    torch._dynamo.reset()
    model = load_model().requires_grad_(True).train()
    inputs = batches[0][:3]
    added: list[torch.nn.Parameter] = []
    if student.linear_branch:
        example = dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), inputs, strict=True))
        added = list(sparseattn.convert(model, student.policy, example | {"return_dict": False}).parameters())
    # For so few steps Inductor would compile longer than it saves.
    compiled = torch.compile(
        model, backend="sparseattn", options={"policy": student.policy, "inner_backend": "aot_eager"}
    )
    student.switched = error_of(compiled, seed)
    student.clips["before"] = generate(compiled, seed)
    for loss in tqdm(
        steps_of(compiled, model, added, batches), total=len(batches), desc=f"{student.name:<12}", unit="step"
    ):
        student.losses.append(loss)
    student.tuned = error_of(compiled, seed)
    student.clips["after"] = generate(compiled, seed)


def steps_of(
    compiled: Model, model: torch.nn.Module, added: list[torch.nn.Parameter], batches: list[Batch]
) -> Iterator[float]:
    """Training steps, of which each gives its loss: the rate rises for a few and then falls to zero."""
    own = {id(parameter) for parameter in added}
    groups = [{"params": [p for p in model.parameters() if id(p) not in own], "lr": RATE}]
    if added:
        groups.append({"params": added, "lr": RATE * PROJECTION_FACTOR})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    steps = len(batches)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps))
    for batch in batches:
        loss = loss_of(compiled, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        yield loss.item()


def table(dense: float, students: tuple[Student, ...]) -> str:
    """Errors, and how much of the gap that the switch opened is closed."""
    tokens = FRAMES * TOKENS_PER_FRAME
    blocks = tokens // BLOCK
    lines = [f"{'attention':<12}{'blocks kept':>12}{'after switch':>14}{'fine-tuned':>12}{'gap closed':>12}"]
    lines.append(f"{DENSE:<12}{f'{blocks} / {blocks}':>12}{dense:>14.4f}{'':>12}{'':>12}")
    for one in students:
        kept = max(1, int(round(1 - one.sparsity, 6) * blocks))
        closed = (one.switched - one.tuned) / (one.switched - dense)
        row = f"{one.name:<12}{f'{kept} / {blocks}':>12}{one.switched:>14.4f}{one.tuned:>12.4f}{closed:>11.0%}"
        lines.append(row)
    return "\n".join(lines)


def plot_losses(students: tuple[Student, ...], path: Path) -> None:
    """Distance to the teacher over the steps, as moving means."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for one in students:
        losses = torch.tensor(one.losses)
        axes.plot([losses[max(0, i - 4) : i + 1].mean() for i in range(len(losses))], label=one.name)
    axes.set(xlabel="step", ylabel="squared distance to dense (mean of 5 steps)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> tuple[float, tuple[Student, ...]]:
    """Run the comparison; the error of dense attention, and the students."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help=f"of {BATCH} clips each")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("finetune_out"))
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    teacher = load_model()
    dense, clip = error_of(teacher, options.seed), generate(teacher, options.seed)
    batches = taught(teacher, options.steps, options.seed)
    for student in STUDENTS:
        tune(student, batches, options.seed)
    print(f"\n{table(dense, STUDENTS)}\n")
    sla, sparse = STUDENTS[:2]
    print(f"{sla.name} against {sparse.name}, fine-tuned: {sla.tuned / sparse.tuned - 1:+.2%} error\n")
    options.out.mkdir(parents=True, exist_ok=True)
    plot_losses(STUDENTS, options.out / "losses.png")
    clips = {DENSE: clip, "SLA before": sla.clips["before"], "SLA after": sla.clips["after"]}
    contact_sheet(clips | {"sparse after": sparse.clips["after"]}).save(options.out / "contact_sheet.png")
    results = {one.name: {"switched": one.switched, "tuned": one.tuned, "losses": one.losses} for one in STUDENTS}
    (options.out / "results.json").write_text(json.dumps({DENSE: dense, "students": results}, indent=1))
    print(f"loss curves, contact sheet (dense, SLA before and after, sparse after) and numbers: {options.out}")
    return dense, STUDENTS


if __name__ == "__main__":
    main()
