"""docs/collectives.md: its programs run as printed, and its table is the registry's."""

import re
import subprocess
import sys
from pathlib import Path

from forked_programs import Program

from shoal.comm.collectives.registry import ALGORITHMS

PAGE = (Path(__file__).parents[3] / "docs" / "collectives.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_calls_run_as_printed(tmp_path, warm):
    source = blocks("python")[0].replace(
        '("gloo")', f'("gloo", init_method="file://{tmp_path}/s", rank=0, world_size=1)'
    )
    program = Program([sys.executable, "-c", source], source=warm, stdout=subprocess.PIPE, text=True)
    assert program.communicate(120)[0] == "[0] [1.0, 1.0, 1.0, 1.0]\n"
    assert program.returncode == 0


def test_the_program_looks_as_printed(capsys):
    scope = {}
    exec(compile(blocks("python")[1], "docs/collectives.md", "exec"), scope)
    assert capsys.readouterr().out == blocks("text")[0]
    assert scope["picture"].startswith("<svg")


def test_two_levels_are_faster_on_two_hosts_as_the_page_lets_one_see(capsys):
    exec(compile(blocks("python")[2], "docs/collectives.md", "exec"), {})
    flat, levels = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert levels < flat


def test_the_table_of_the_page_is_the_registry():
    rows = [line.strip("| ").split("|") for line in PAGE.splitlines() if line.startswith("| ")]
    names = [re.split(r", ", cell.strip()) for cell in rows[0][1:]]
    told = {}
    for row in rows[1:]:
        algorithms = re.findall(r"`(\w+)`", row[0])
        marked = row[1:] + [""] * (len(names) - len(row) + 1)
        held = {name for column, cell in zip(names, marked, strict=True) for name in column if cell.strip() == "x"}
        told |= dict.fromkeys(algorithms, held)
    assert told == {name: set(algorithm.makes) - {"send_recv"} for name, algorithm in ALGORITHMS.items()}


def test_programs_are_made_checked_and_drawn_without_torch():
    modules = [
        f"shoal.comm.collectives.{name}" for name in ("actions", "registry", "check", "draw", "traffic", "draft")
    ]
    source = f"import sys, {', '.join(modules)}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
