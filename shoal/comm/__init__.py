"""Everything that moves between workers. Names are imported when they are first used: torch comes with most of them."""

from importlib import import_module
from typing import Any

_HOME: dict[str, str] = {  # public name -> the module that holds it
    "install": "shoal.comm.backend.registration",
    "reform": "shoal.comm.backend.reform",
    "symm_empty": "shoal.comm.backend.groups",
    **dict.fromkeys(
        (
            "all_gather",
            "all_reduce",
            "all_to_all",
            "barrier",
            "broadcast",
            "gather",
            "receive",
            "reduce",
            "reduce_scatter",
            "run_program",
            "scatter",
            "send",
        ),
        "shoal.comm.collectives.operations",
    ),
    **dict.fromkeys(
        ("BF16", "FP16", "Compressor", "Int8", "OneBit", "PowerSGD", "TopK", "compressed_all_reduce"),
        "shoal.comm.compression.compressor",
    ),
    **dict.fromkeys(("compress", "hook"), "shoal.comm.compression.hooks"),
    **dict.fromkeys(("group_counters", "record"), "shoal.comm.accounting.recording"),
    **dict.fromkeys(("Probed", "probe"), "shoal.comm.measuring.probing"),
    **dict.fromkeys(("choose", "plan"), "shoal.comm.collectives.choose"),
    **dict.fromkeys(("ParameterServer", "Served", "serve"), "shoal.comm.server.api"),
    "worth_it": "shoal.comm.compression.worth",
}
__all__ = [*_HOME]  # noqa: PLE0604  (all names are text)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shoal.comm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
