"""Puts compiled C++ parts into a wheel where a compiler is there, and goes without where none is; see pyproject.toml.

An editable installation compiles on first use instead. Nothing here may make an installation fail.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("shoal", "comm", "native")


def prebuild(folder: Path) -> list[str]:
    """Compile into ``folder`` what can be compiled here; a line for each part that cannot."""
    spec = importlib.util.spec_from_file_location("shoal_native_build", NATIVE / "build.py")
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build  # its dataclasses look themselves up
    spec.loader.exec_module(build)
    return build.prebuild(folder.absolute())


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / NATIVE / "prebuilt"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        try:
            without = prebuild(folder)
        except Exception as error:
            without = [str(error)]
        for reason in without:
            print(f"shoal: not compiled now, but on first use where that can be: {reason}", file=sys.stderr)


class BdistWheel(bdist_wheel):
    """The wheel's tag says what its libraries need: nothing, this kind of machine, or this Python too."""

    found: tuple[str, ...] = ()  # the compiled parts; an editable installation asks for the tag without building

    def run(self) -> None:
        self.run_command("build")
        self.found = tuple(file.name for file in (self._build_lib() / NATIVE / "prebuilt").glob("*.so"))
        if self.found:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # so that all of it goes where a machine's own files lie
        super().run()

    def _build_lib(self) -> Path:
        return Path(self.get_finalized_command("build_py").build_lib)

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, machine = super().get_tag()
        if self.found and not any(name.startswith("shoal_backend") for name in self.found):
            return "py3", "none", machine
        return python, abi, machine


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
