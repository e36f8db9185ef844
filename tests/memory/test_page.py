"""What the page on memory says is run."""

from collections.abc import Callable
from pathlib import Path

from test_docs import blocks, run

__all__ = ["run"]


def test_the_page_about_memory_shows_what_its_program_prints(tmp_path: Path, run: Callable[..., str]) -> None:
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks("docs/memory.md", "python")))
    assert run(program) == blocks("docs/memory.md", "text")[0]
