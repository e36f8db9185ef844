"""docs/topology.md: its programs print what stands below them."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "topology.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("program", "printed"), PROGRAMS)
def test_a_program_prints_what_stands_below_it(program, printed, capsys):
    exec(compile(program, "docs/topology.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_page_has_programs():
    assert len(PROGRAMS) == PAGE.count("```python") == 2
