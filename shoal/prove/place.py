"""A verdict's first difference in words."""

from collections.abc import Mapping
from typing import Any


def place_of(verdict: Mapping[str, Any]) -> str:
    """ "step 3, layer layers.0, gradient/layers.0.weight; ranks 0 1; looks like ..."; "" where nothing differs."""
    said, differs = [], verdict["differs"]
    if differs:
        layer = f"layer {differs['layer']}, " if differs.get("layer") else ""
        others = len(verdict.get("layers", ())) - 1
        more = f" and {others} more layer{'s' if others > 1 else ''}" if others > 0 else ""
        said.append(f"step {differs['step']}, {layer}{differs['tensor']}{more}")
    said += [f"{key} {' '.join(map(str, verdict[key]))}" for key in ("ranks", "shards") if verdict.get(key)]
    said += [f"looks like: {verdict['looks_like']}"] if verdict.get("looks_like") else []
    return "; ".join([*said, *filter(None, [verdict.get("failure")])])
