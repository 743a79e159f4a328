"""The fingerprint: of a model's structure alone, whatever was wrapped around it or added to it."""

import hashlib
import re

import pytest
import torch
from support.attention_model import Blocks
from torch import nn

from sparseattn import fingerprint
from sparseattn.nn.attached import SlaProjection, attach, detach


class Other(Blocks):
    """Blocks by another name."""


def test_values_buffers_and_devices_do_not_count():
    first = fingerprint(Blocks())
    assert re.fullmatch("[0-9a-f]{12}", first)
    assert fingerprint(Blocks()) == first
    with torch.device("meta"):
        assert fingerprint(Blocks()) == first
    model = Blocks().eval().requires_grad_(False)
    model.register_buffer("rotary", torch.zeros(3))
    assert fingerprint(model) == first


def test_it_is_the_same_everywhere():
    lines = [
        ": Sequential",
        "0: Linear",
        "0.weight: (3, 2) torch.float32",
        "0.bias: (3,) torch.float32",
    ]
    expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    assert fingerprint(nn.Sequential(nn.Linear(2, 3))) == expected == "f23d827a1d85"


@pytest.mark.parametrize(
    "other",
    [
        lambda: Blocks(3),
        lambda: Blocks().bfloat16(),
        lambda: Blocks(head_dim=32),
        Other,
        lambda: nn.ModuleDict({"model": Blocks()}),
    ],
    ids=["another layer", "another dtype", "other shapes", "another type", "other paths"],
)
def test_another_structure_has_another(other):
    assert fingerprint(other()) != fingerprint(Blocks())


def test_compiling_the_model_or_a_part_of_it_keeps_it():
    model = Blocks()
    before = fingerprint(model)
    assert fingerprint(torch.compile(model, backend="eager")) == before
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert fingerprint(model) == before
    assert fingerprint(torch.compile(model, backend="eager")) == before


def test_what_convert_adds_does_not_count():
    model = Blocks()
    before = fingerprint(model)
    attach(model.blocks[0], SlaProjection(16))
    assert fingerprint(model) == before
    detach(model.blocks[0])
    assert fingerprint(model) == before


def test_tied_weights_and_shared_modules():
    shared = nn.Linear(4, 4)
    assert fingerprint(nn.Sequential(shared, shared)) != fingerprint(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = fingerprint(tied)
    tied[1].weight = tied[0].weight
    assert fingerprint(tied) == before
