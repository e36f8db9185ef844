"""What the pages say is run."""

import difflib
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import forked_programs
import pytest
from forked_programs import Source

from shoal.run.run import Run
from shoal.train.checkpoint import newest as load_newest

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(warm: Source) -> Callable[..., str]:
    """What a program prints, in a process of its own."""

    def run_program(program: Path, *arguments: str) -> str:
        code = f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')"
        done = forked_programs.run([sys.executable, "-c", code, *arguments], warm, cwd=program.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_program


@pytest.fixture
def said_by(
    launches_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[str], str]:
    """What the program of a page prints: run in this process, with forks of the agent of all tests for its launches.
    That a program runs by itself is shown for the README's; what workers print goes past it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # runs that a page makes go with the test

    def run_page(page: str) -> str:
        program = tmp_path / "program.py"
        program.write_text("\n".join(blocks(page, "python")))
        runpy.run_path(str(program), run_name="__main__")
        return capsys.readouterr().out

    return run_page


def test_the_readme_program_gives_the_same_hash_on_one_process_and_on_two(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks("README.md", "python")))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    hashes = done.stdout.split()
    assert len(hashes) == 2
    assert re.fullmatch(r"[0-9a-f]{64}", hashes[0])
    assert hashes[0] == hashes[1]


def test_the_page_shows_the_difference_between_the_two_scripts() -> None:
    scripts = [(f"examples/{name}.py", (ROOT / f"examples/{name}.py").read_text()) for name in ("plain", "with_shoal")]
    (old, before), (new, after) = scripts
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), old, new, lineterm="", n=1)
    assert blocks("docs/your_own_loop.md", "diff") == ["\n".join(lines) + "\n"]


def test_the_script_with_shoal_learns_what_the_plain_one_learns(run: Callable[..., str]) -> None:
    """With the whole set as one batch the order of samples does not matter: only the order of sums differs."""
    plain = float(run(ROOT / "examples/plain.py", "2048", "6").split()[-1])
    for workers in "12":
        ours = float(run(ROOT / "examples/with_shoal.py", workers, "2048", "6").split()[-1])
        assert ours == pytest.approx(plain, abs=1e-5)  # float32: 195 weights, each summed in another order


def test_the_recording_on_the_page_about_communication_counts_what_the_step_did(
    run: Callable[..., str], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks("docs/communication.md", "python")))
    said = run(program)
    assert said.count("reduce-scatter  shared memory") == 1, "the last step's"
    assert "0.131 MB" in said


def test_the_page_about_layouts_shows_what_its_program_prints(said_by: Callable[[str], str]) -> None:
    assert said_by("docs/layouts.md") == blocks("docs/layouts.md", "text")[0]


def test_the_page_about_pipelines_shows_what_its_program_prints(said_by: Callable[[str], str]) -> None:
    assert said_by("docs/pipeline.md") == blocks("docs/pipeline.md", "text")[0]


def test_the_page_about_sharded_states_shows_what_its_program_prints(said_by: Callable[[str], str]) -> None:
    assert said_by("docs/sharded_states.md") == blocks("docs/sharded_states.md", "text")[0]


def test_the_page_about_proofs_shows_what_its_program_prints(said_by: Callable[[str], str]) -> None:
    assert said_by("docs/prove.md") == blocks("docs/prove.md", "text")[0]


def test_the_page_about_serving_runs_as_printed(run: Callable[..., str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks("docs/serving.md", "python")))
    assert run(program).splitlines() == ["fish are nearer to fish: True", "numbers over HTTP: 384"]


def test_every_file_that_a_page_points_at_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} points at {target}"


def test_the_page_about_splitting_shows_equal_hashes_for_pipelines(said_by: Callable[[str], str]) -> None:
    rows = [line.split()[:2] for line in said_by("docs/splitting.md").splitlines()]
    assert len(rows) == 4
    assert len({loss for loss, _ in rows}) == 1
    assert rows[0][1] == rows[1][1] == rows[2][1] != rows[3][1]


def events_of_the_design() -> dict[str, set[str]]:
    """Of each event in the table of docs/design.md, the words of its row."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (`.*) \|$", text, flags=re.MULTILINE)
    return {name: set(re.findall(r"\w+", row)) for names, row in rows for name in re.findall(r"\w+", names)}


def carried_out(script: str, folder: Path, warm: Source) -> str:
    """What commands of `shoal` print, which are forks; all else of a script is the shell's."""
    said = ""
    for part in re.split(r"^(shoal .*)\n", script, flags=re.MULTILINE):
        if part.startswith("shoal "):
            done = forked_programs.run([sys.executable, "-m", *shlex.split(part)], warm, cwd=folder)
        else:
            done = subprocess.run(["bash", "-ec", part], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{part}: {done.stderr}"
        said += done.stdout
    return said


@pytest.mark.slow
def test_the_case_studies_run_as_printed_and_learn_the_same(warm: Source, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text(
        "where the work runs may change the time and the memory, never the result. " * 60
    )
    said = carried_out("\n".join(blocks("docs/case_studies.md", "sh")), tmp_path, warm)
    assert "attention.qkv" in said, "what each layer sends"
    weights = [load_newest(tmp_path / name / "checkpoints")[0] for name in ("megatron", "rules")]
    assert (tmp_path / "both.html").stat().st_size > 10_000
    assert [found.step for found in weights if found] == [3, 2], "one of them went on under the rules"
    logs = [Run(tmp_path / name).events() for name in ("megatron", "rules")]
    rows = events_of_the_design()
    for event in (event for log in logs for event in log):
        assert set(event) - {"time", "event"} <= rows[event["event"]], "the design's table names every field"
    losses = [{event["step"]: event["loss"] for event in log if event["event"] == "committed"} for log in logs]
    assert len(losses[0]) == 3
    for step, loss in losses[1].items():
        assert losses[0][step] == pytest.approx(loss, rel=1e-5)
