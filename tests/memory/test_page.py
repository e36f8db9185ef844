"""What the page on memory says is run."""

from pathlib import Path

from test_docs import blocks
from test_docs import run as run_program


def test_the_page_about_memory_shows_what_its_program_prints(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks("docs/memory.md", "python")))
    assert run_program(program) == blocks("docs/memory.md", "text")[0]
