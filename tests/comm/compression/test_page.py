"""The program on the page about compression runs as printed."""

import re
from pathlib import Path

from forked_programs import Source
from torchrun_programs import outputs

PAGE = Path(__file__).parents[3] / "docs" / "compression.md"


def test_the_program_on_the_page_runs_as_torchrun_starts_it(warm: Source) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    printed = "".join(outputs(program, 2, warm)[0])
    assert re.search(r"sum 3\.000, \d+ bytes instead of 524288", printed)
    sent = int(re.search(r", (\d+) bytes", printed)[1])
    assert 0.25 < sent / 524288 < 0.27
