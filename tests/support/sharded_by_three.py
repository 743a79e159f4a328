"""What three ranks do: every method, rings, and models, which are imported here, before the ranks are forked."""

from diffusers import WanTransformer3DModel  # noqa: F401
from support.sharded_cases import MODELS, OPS
from support.sharded_rings import RINGS
from transformers import LlamaForCausalLM  # noqa: F401

CASES = {**OPS, **RINGS, **MODELS}
