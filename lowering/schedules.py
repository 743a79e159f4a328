"""Schedules over the layers of a model, written as the rules of a policy: which layer uses which form of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..attn_ops.call import ParamValue
from ..attn_ops.errors import PolicyError
from ..attn_ops.video_layout import VideoLayout
from .rule import Mode, Rule

Chunks = Mapping[str, ParamValue | Sequence[int]]
"""Parameters of `vmoba` for one kind of layer: `chunk`, or `chunk_tokens`, and `topk` or `threshold`."""

TEMPORAL: Chunks = {"chunk": (2, 0, 0), "topk": 3}
SPATIAL: Chunks = {"chunk": (0, 3, 4), "topk": 20}
SPATIO_TEMPORAL: Chunks = {"chunk": (4, 6, 4), "topk": 15}


def vmoba_rules(
    layers: int,
    *,
    layout: VideoLayout | Mapping[str, object] | Sequence[int] | None = None,
    temporal: Chunks = TEMPORAL,
    spatial: Chunks = SPATIAL,
    st: Chunks = SPATIO_TEMPORAL,
    cycle: tuple[int, int, int] = (1, 1, 1),
    first_full_layer: int = 0,
    first_full_step: int = 0,
    module: str = "blocks.{}.*",
    params: Chunks | None = None,
    mode: Mode = "prefer",
) -> list[Rule]:
    """The rules of VMoBA's cycle of temporal, spatial and spatio-temporal chunks over the layers of a model.

    From layer `first_full_layer` on, the kinds take turns: cycle[0] layers temporal, cycle[1] spatial, cycle[2]
    spatio-temporal, and again. There is one rule for each kind, and one that leaves the layers before dense.

    The keys of the published configurations, and where they go here:

        temporal_layer, spatial_layer, st_layer              cycle
        temporal_chunk_size: c                               temporal={"chunk": (c, 0, 0)}; for a c that is not whole
                                                             {"chunk_tokens": int(c * H * W)}
        spatial_chunk_size: [h, w]                           spatial={"chunk": (0, h, w)}
        st_chunk_size: [t, h, w]                             st={"chunk": (t, h, w)}
        temporal_topk, spatial_topk, st_topk                 "topk" of each
        moba_select_mode, moba_threshold,                    params={"select": ..., "threshold": ...,
          moba_threshold_type                                  "threshold_type": ...}
        first_full_layer                                     first_full_layer; published code ignores it but for the
                                                             turn of the cycle, here these layers are dense
        first_full_step                                      first_full_step; published code never reads it, here these
                                                             steps are left to the rules below, or dense

    Args:
        layers: layers of the model.
        layout: VideoLayout of the sites, as a rule takes it; None takes what the graph shows.
        temporal: parameters of the temporal layers; the defaults of all three are those published for Wan 2.1 1.3B,
            77 x 480 x 832.
        spatial: of the spatial layers.
        st: of the spatio-temporal layers.
        cycle: layers of each kind in one turn; at least one in all.
        first_full_layer: layers before this one stay dense.
        first_full_step: steps before this one have no rule with chunks; `sparseattn.steps` says which step it is, and
            where no step is set there is none either.
        module: glob on the module path of the self-attention of a layer, {} for its number.
        params: parameters for all kinds.
        mode: of the rules with chunks: "prefer" or "require".

    Raises:
        PolicyError: on a wrong count, a `module` without {}, or a parameter that a rule refuses.

    Paper: https://arxiv.org/abs/2506.23858
    """
    _check_counts(layers, cycle, first_full_layer, first_full_step)
    if "{}" not in module:
        raise PolicyError(f'vmoba_rules: module must have {{}} for the number of the layer, got "{module}".')
    kinds: list[list[str]] = [[], [], []]
    for layer in range(first_full_layer, layers):
        turn = (layer - first_full_layer) % sum(cycle)
        kind = 0 if turn < cycle[0] else 1 if turn < cycle[0] + cycle[1] else 2
        kinds[kind].append(module.format(layer))
    dense = [module.format(layer) for layer in range(min(first_full_layer, layers))]
    rules = [Rule("dense", modules=dense, kind="self", why="VMoBA: the first layers are full")] if dense else []
    names = "temporal", "spatial", "spatio-temporal"
    steps = f"{first_full_step}:" if first_full_step else None
    for name, modules, own in zip(names, kinds, (temporal, spatial, st), strict=True):
        if modules:
            given, why = {**(params or {}), **own}, f"VMoBA: {name} chunks"
            sites: dict[str, Any] = {"modules": modules, "kind": "self", "steps": steps}
            rules.append(Rule("vmoba", **sites, mode=mode, params=given, layout=layout, why=why))
    return rules


def _check_counts(layers: int, cycle: tuple[int, int, int], first_full_layer: int, first_full_step: int) -> None:
    full = ("first_full_layer", first_full_layer, 0), ("first_full_step", first_full_step, 0)
    for name, value, least in (("layers", layers, 1), *full):
        if type(value) is not int or value < least:
            raise PolicyError(f"vmoba_rules: {name} must be an int of at least {least}, got {value!r}.")
    if len(cycle) != 3 or min(cycle) < 0 or sum(cycle) == 0:
        raise PolicyError(f"vmoba_rules: cycle must be three ints of at least 0, not all 0, got {cycle!r}.")
