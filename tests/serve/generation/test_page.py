"""What docs/generation.md says is run."""

import re
import sys
from dataclasses import fields
from pathlib import Path

from forked_programs import run

from shoal.serve.generation.bodies import ChatBody, CompletionBody
from shoal.serve.generation.options import Options

PAGE = (Path(__file__).parents[3] / "docs" / "generation.md").read_text(encoding="utf-8")


def test_the_page_shows_what_its_program_prints(warm):
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    (printed,) = re.findall(r"^```text\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    done = run([sys.executable, "-c", program], warm)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_the_page_names_every_option_and_every_field_that_is_looked_at():
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert {each.name for each in fields(Options)} - {"threads"} <= named
    not_looked_at = {"model", "metadata", "store", "max_completion_tokens", "response_format"}
    asked = {*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__} - not_looked_at
    assert asked <= named, asked - named
