"""Programs of bench/ as modules, by their place: on the path they would hide folders of tests of the same name."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def bench(name: str) -> ModuleType:
    full = f"bench_{name}"
    if full not in sys.modules:
        spec = spec_from_file_location(full, Path(__file__).parents[1] / "bench" / f"{name}.py")
        sys.modules[full] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]
