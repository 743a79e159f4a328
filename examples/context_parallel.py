"""One video model on several processes: each holds a part of the tokens, attention is over all of them.

    torchrun --standalone --nproc-per-node 4 examples/context_parallel.py

It compiles a small Wan model (random weights) on one rank's share of the tokens, compares output and gradients with the
whole model, and prints the report of rank 0 with the bytes that it sends.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch.distributed.device_mesh import init_device_mesh

import sparseattn
from sparseattn import parallel

POLICY = {
    "name": "vsa",
    "rules": [{"use": "vsa", "kind": "self", "params": {"tile": [1, 2, 2], "sparsity": 0.5}}, {"use": "flash"}],
}


def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output, after the gradients of its mean square."""
    (out,) = model(**inputs, return_dict=False)
    out.square().mean().backward()
    return out.detach()


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    mesh = init_device_mesh("cpu", (ranks,))
    inputs = {"hidden_states": torch.randn(1, 4, 3, 6, 10, generator=torch.Generator().manual_seed(1))}
    inputs |= {"encoder_hidden_states": torch.ones(1, 12, 16), "timestep": torch.tensor([1])}

    whole, parts = wan(), wan()
    whole.compile(backend="sparseattn", options={"policy": POLICY, "inner_backend": "aot_eager"})
    expected = run(whole, inputs)

    parallel.shard_model(parts, mesh)
    shared = parallel.ContextParallel(mesh)
    options = {"policy": POLICY, "parallel": shared, "inner_backend": "aot_eager"}
    parts.compile(backend="sparseattn", fullgraph=True, options=options)
    got = run(parts, inputs)
    for parameter in parts.parameters():
        if parameter.grad is not None:  # as data parallelism does
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks

    pairs = [(one.grad, other.grad) for one, other in zip(whole.parameters(), parts.parameters(), strict=True)]
    grad_error = max((one - other).abs().max().item() for one, other in pairs if one is not None and other is not None)
    if rank == 0:
        print(sparseattn.last_report())
        print(f"{ranks} ranks: output differs by {(got - expected).abs().max():.1e}, gradients by {grad_error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
