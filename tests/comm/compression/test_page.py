"""The program on the page about compression runs as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "compression.md"


@pytest.mark.slow
def test_the_program_on_the_page_runs_under_torchrun(tmp_path: Path) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    file = tmp_path / "program.py"
    file.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"sum 3\.000, \d+ bytes instead of 524288", done.stdout)
    sent = int(re.search(r", (\d+) bytes", done.stdout)[1])
    assert 0.25 < sent / 524288 < 0.27
