"""What docs/schedules.md shows is what the code does."""

import re
import sys
from pathlib import Path

from forked_programs import run

from shoal.parallel.schedules import make_schedule, verify
from shoal.parallel.schedules.csv_file import parse_csv
from shoal.parallel.schedules.draw import timeline_text
from shoal.parallel.schedules.registry import MAKERS
from shoal.parallel.schedules.simulation import simulate

PAGE = (Path(__file__).parents[3] / "docs" / "schedules.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_every_schedule_is_on_the_page_with_its_own_picture():
    assert re.findall(r"^### (\S+)$", PAGE, flags=re.MULTILINE) == list(MAKERS)
    for name, picture in zip(MAKERS, blocks("text"), strict=True):
        chunks = 2 if MAKERS[name].chunks is None else 1
        line = simulate(make_schedule(name, 4, 2 if name == "off" else 8, chunks))
        assert picture == timeline_text(line, 120) + "\n", name


def test_the_csv_on_the_page_is_a_schedule():
    (text,) = blocks("csv")
    schedule = parse_csv(text, "mine.csv")
    verify(schedule)
    assert (schedule.workers, schedule.micro_batches) == (2, 3)


def test_the_program_on_the_page_runs_and_names_the_deadlock(warm):
    (program,) = blocks("python")
    done = run([sys.executable, "-c", program], warm)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("RF1.0<0 F1.0 I1.0 RF1.1<0 SB1.0>0")
    assert "worker 1 at F1.1 waits for worker 0" in said[-1]
    assert len(said) == 3
