"""What the page on parameter servers says is run."""

import re
import sys
from pathlib import Path
from subprocess import PIPE

from forked_programs import Program

PAGE = Path(__file__).parents[3] / "docs" / "parameter_server.md"


def test_the_loop_on_the_page_learns(warm):
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    program = Program([sys.executable, "-c", block], source=warm, stdout=PIPE, text=True)
    printed, _ = program.communicate(120)
    assert program.returncode == 0
    said = re.fullmatch(r"loss (\S+) after 100 updates\n", printed)
    assert said, printed
    assert float(said[1]) < 1e-6
