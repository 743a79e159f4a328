"""Vendor builds that are known to return wrong numbers without an error, each with the report that shows it.

An entry says for which calls and machines it holds. It may stand here before its package has an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..call import AttentionCall
from ..capability import Capability


@dataclass(frozen=True, slots=True)
class KnownBad:
    """A build that must not be used.

    Args:
        package: its import name.
        sentence: what it does wrong, and where.
        link: the report, or the release if nobody has reported it.
        applies: whether a call on a machine meets it. None: only the running call can tell, and `stream` refuses it.
    """

    package: str
    sentence: str
    link: str
    applies: Callable[[AttentionCall, Capability], bool] | None

    def __str__(self) -> str:
        return f"{self.sentence} ({self.link})"


def reasons(package: str, call: AttentionCall, capability: Capability) -> list[str]:
    """Return why a package's build is wrong for a call on a machine, one sentence with its link for each entry."""
    return [str(e) for e in KNOWN_BAD if e.package == package and e.applies and e.applies(call, capability)]


def at_run_time(package: str) -> list[str]:
    """Return the entries of a package that `reasons` cannot judge, as sentences with their links."""
    return [str(e) for e in KNOWN_BAD if e.package == package and e.applies is None]


def _sage_2_2_0_on_hopper(_call: AttentionCall, capability: Capability) -> bool:
    return capability.sm == 90 and capability.version_of("sageattention") == (2, 2, 0)


def _sage_1_reads_past_the_keys(call: AttentionCall, capability: Capability) -> bool:
    version = capability.version_of("sageattention") or ()
    return version[:1] == (1,) and not call.causal and (call.seq_k % 64 != 0 or "seq_k" in call.dynamic)


def _long_fp8_on_consumer_blackwell(call: AttentionCall, capability: Capability) -> bool:
    return capability.sm in (120, 121) and call.param("pv") == "fp8" and call.seq_k > 160_000


def _causal(call: AttentionCall, _capability: Capability) -> bool:
    return call.causal


_SAGE = "https://github.com/thu-ml/SageAttention"

KNOWN_BAD = (
    KnownBad(
        "sageattention",
        "sageattention 2.2.0 returns uninitialised memory on sm90",
        f"{_SAGE}/issues/320",
        _sage_2_2_0_on_hopper,
    ),
    KnownBad(
        "sageattention",
        'pv="fp8" with more than 160000 keys gives noise on sm120',
        f"{_SAGE}/issues/388",
        _long_fp8_on_consumer_blackwell,
    ),
    KnownBad(
        "sageattention",
        "a CUDA graph that captured its kernels replays wrong results",
        f"{_SAGE}/issues/392",
        None,
    ),
    KnownBad(
        "sageattention",
        "sageattention 1.x attends to memory past the last key unless their number is a multiple of 64",
        "https://github.com/thu-ml/SageAttention",
        _sage_1_reads_past_the_keys,
    ),
    KnownBad(
        "sageattn3",
        "causal attention leaves out values of one tile of keys for every tile of queries",
        f"{_SAGE}/issues/340",
        _causal,
    ),
)
