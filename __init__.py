"""sparseattn: a torch.compile backend that makes attention faster in models nobody has to edit.

    model = torch.compile(model, backend="sparseattn")

Importing this package registers `torch.ops.sparseattn.*` and changes nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparseattn import nn
from sparseattn.attn_ops import backends as _backends  # noqa: F401  (registers the ops)
from sparseattn.attn_ops import ops
from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.registry import backends, register
from sparseattn.attn_ops.schedule import Schedule
from sparseattn.attn_ops.video_layout import VideoLayout
from sparseattn.lowering.fingerprint import fingerprint
from sparseattn.lowering.measured import Measured, MeasuredPoint, MeasuredRule
from sparseattn.lowering.policy import Policy, Rule
from sparseattn.lowering.precedence import use_policy
from sparseattn.lowering.sparge_tuning import SpargeTuning
from sparseattn.lowering.sta_strategy import StaStrategy
from sparseattn.lowering.steps import step_callback, steps

if TYPE_CHECKING:
    from sparseattn.fx_passes import export, parallel, viz
    from sparseattn.fx_passes.calibration.calibrate import calibrate
    from sparseattn.fx_passes.calibration.samples import Sample
    from sparseattn.fx_passes.convert import Conversion, convert, unconvert
    from sparseattn.fx_passes.explain import explain
    from sparseattn.fx_passes.publish import last_report
    from sparseattn.fx_passes.report import Report
    from sparseattn.fx_passes.rewrite_program import rewrite
    from sparseattn.fx_passes.sta_losses import StaLosses, sta_losses
    from sparseattn.fx_passes.tune import Tuning, tune

__version__ = "0.1.0"

__all__ = [
    "BlockIndex",
    "Capability",
    "Conversion",
    "Measured",
    "MeasuredPoint",
    "MeasuredRule",
    "Policy",
    "Report",
    "Rule",
    "Sample",
    "Schedule",
    "SpargeTuning",
    "StaLosses",
    "StaStrategy",
    "Tuning",
    "VideoLayout",
    "backends",
    "calibrate",
    "convert",
    "explain",
    "export",
    "fingerprint",
    "last_report",
    "nn",
    "ops",
    "parallel",
    "register",
    "rewrite",
    "sta_losses",
    "step_callback",
    "steps",
    "tune",
    "tune_sparge",
    "unconvert",
    "use_policy",
    "viz",
]

# These bring Dynamo with them, so they are imported when first used.
_LAZY = {
    "Sample": "sparseattn.fx_passes.calibration.samples",
    "calibrate": "sparseattn.fx_passes.calibration.calibrate",
    "Conversion": "sparseattn.fx_passes.convert",
    "convert": "sparseattn.fx_passes.convert",
    "unconvert": "sparseattn.fx_passes.convert",
    "Report": "sparseattn.fx_passes.report",
    "StaLosses": "sparseattn.fx_passes.sta_losses",
    "sta_losses": "sparseattn.fx_passes.sta_losses",
    "explain": "sparseattn.fx_passes.explain",
    "last_report": "sparseattn.fx_passes.publish",
    "rewrite": "sparseattn.fx_passes.rewrite_program",
    "Tuning": "sparseattn.fx_passes.tune",
    "tune": "sparseattn.fx_passes.tune",
    "tune_sparge": "sparseattn.fx_passes.tune_sparge",
}


def __getattr__(name: str) -> Any:
    if name in ("export", "parallel", "viz"):
        return importlib.import_module(f"sparseattn.fx_passes.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sparseattn' has no attribute {name!r}")
