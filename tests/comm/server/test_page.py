"""What the page on parameter servers says is run."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "parameter_server.md"


def test_the_loop_on_the_page_learns(tmp_path):
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "program.py").write_text(block)
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = re.fullmatch(r"loss (\S+) after 100 updates\n", done.stdout)
    assert said, done.stdout
    assert float(said[1]) < 1e-6
