"""Adapters to other packages' kernels, one file per package. A package is imported when its kernel is first loaded."""

from __future__ import annotations

from ..spec import Provider
from . import fastvideo_kernel, flash_attn, sageattention, spas_sage_attn

PROVIDERS: dict[str, tuple[Provider, ...]] = {
    "flash_attn": (flash_attn.PROVIDER,),
    "sageattention": (sageattention.PROVIDER,),
    "spas_sage_attn": (spas_sage_attn.PROVIDER,),
    "fastvideo_kernel": (fastvideo_kernel.PROVIDER,),
}
"""Import name of a package -> what it provides here, whether or not a backend uses it already."""
