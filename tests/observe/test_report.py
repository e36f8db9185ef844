"""The report as a file: what it holds, what it lets nobody smuggle in, and which runs it can tell of."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from logbook import committed, evaluated, make_run, started, story

from shoal.errors import UserError
from shoal.observe.curves import read_curves
from shoal.observe.report import write
from shoal.recipe.recipe import DataSpec, ModelSpec

PLANTED = '<script>window.planted = 1</script><img src=x onerror="window.planted = 1">\'"&amp;'
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Elements(HTMLParser):
    """All elements with their attributes; `unclosed` holds what was opened and never closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture
def run(tmp_path):
    return make_run(
        tmp_path / "first", story(), origins={"optimizer.lr": "flag --optimizer.lr", "mesh.data": "measured"}
    )


def test_the_report_lies_in_the_run_and_is_well_formed(run):
    place = write([run])
    assert place == run.report
    elements = Elements(place.read_text(encoding="utf-8"))
    assert (elements.open, elements.wrong) == ([], [])
    assert not list(run.path.glob(".report*"))


def test_every_key_of_recipe_and_plan_has_its_origin(run):
    page = write([run]).read_text(encoding="utf-8")
    origins = dict(re.findall(r'<tr data-key="([^"]*)">.*?class="origin[^"]*">([^<]*)<', page))
    assert origins["optimizer.lr"] == "flag --optimizer.lr"
    assert origins["mesh.data"] == "measured"
    assert origins["seed"] == "default"
    assert {"model.kind", "model.width", "batch", "report.keep", "sync"} <= set(origins)


def test_the_page_asks_for_nothing_outside_of_itself(run):
    page = write([run]).read_text(encoding="utf-8")
    for tag, attributes in Elements(page).found:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_text_from_the_run_is_never_markup(tmp_path):
    events = [
        started(host=PLANTED, torch=PLANTED),
        committed(1),
        evaluated(1, split=PLANTED, **{PLANTED: 1.0, "loss": 2.0}),
    ]
    events += [{"time": 2.0, "event": "sampled", "step": 1, "text": PLANTED}]
    events += [
        {
            "time": 2.0,
            "event": "resumed",
            "step": 1,
            "checkpoint": PLANTED,
            "skipped": [{"path": PLANTED, "why": PLANTED}],
        }
    ]
    events += [
        {"time": 2.0, "event": "checkpointed", "step": 1, "path": PLANTED, "bytes": 1, "stall_s": 0, "write_s": 0}
    ]
    events += [{"time": 3.0, "event": "failed", "step": 1, "why": PLANTED}]
    recipe = {"data": DataSpec(path=PLANTED), "model": ModelSpec(kind=PLANTED, options={PLANTED: PLANTED})}
    planted = make_run(tmp_path / "<script>x<", events, recipe=recipe, origins={"data.path": PLANTED})
    other = make_run(tmp_path / "other", story())
    for runs in ([planted], [planted, other]):
        page = write(runs).read_text(encoding="utf-8")
        elements = Elements(page)
        scripts = [attributes for tag, attributes in elements.found if tag == "script"]
        assert all(attributes.get("type") == "application/json" for attributes in scripts[:-1])
        assert not [tag for tag, _ in elements.found if tag == "img"]
        assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
        assert (elements.open, elements.wrong) == ([], [])
        assert "window.planted" in page  # it is there to be read


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "no end in the log"),
        ([started()], "no end in the log"),
        ([started(), committed(1), committed(2)], "no end in the log · step 2"),
        ([started(), {"time": 1.0, "event": "failed", "step": 0, "why": "the disk is full"}], "failed"),
        (
            [started(), committed(1), {"time": 2.0, "event": "interrupted", "step": 1, "why": "Ctrl-C"}],
            "interrupted · step 1",
        ),
        ([started(), committed(1, loss=float("nan")), committed(2, loss=float("inf"))], "no end in the log · step 2"),
        (story(), "finished"),
    ],
)
def test_a_run_in_any_state_has_a_report(tmp_path, events, state):
    page = write([make_run(tmp_path / "run", events)]).read_text(encoding="utf-8")
    assert f">{state}</span>" in page
    elements = Elements(page)
    assert (elements.open, elements.wrong) == ([], [])


def test_the_last_line_of_the_log_may_be_torn(run):
    log = run.path / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    assert "no end in the log · step 10" in write([run]).read_text(encoding="utf-8")


def test_a_long_run_makes_a_page_of_bounded_size(tmp_path):
    sizes = []
    for count in (3_000, 9_000):
        run = make_run(tmp_path / str(count), [])
        lines = [json.dumps(event) for event in (started(), *(committed(step) for step in range(1, count)))]
        (run.path / "events.jsonl").write_text("\n".join(lines) + "\n")
        sizes.append(write([run]).stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


def test_a_comparison_shows_only_the_keys_that_differ(tmp_path):
    one = make_run(tmp_path / "one", story(), workers=1)
    two = make_run(tmp_path / "two", story(), workers=4, recipe={"seed": 7})
    place = write([one, two])
    assert place == one.path / "compare.html"
    table = re.search(r'<table class="settings differences">.*?</table>', place.read_text(encoding="utf-8"))[0]
    assert re.findall(r'data-key="([^"]*)"', table) == ["seed", "mesh.data"]
    assert re.findall(r'class="value">([^<]*)<', table) == ["0", "7", "1", "4"]


def verdict_of(runs):
    return re.search(r'<p class="verdict">([^<]*)<', write(runs).read_text(encoding="utf-8"))[1]


def test_a_comparison_says_whether_the_weights_are_the_same_to_the_bit(tmp_path):
    one, two = make_run(tmp_path / "one", story(), workers=1), make_run(tmp_path / "two", story(), workers=4)
    assert verdict_of([one, two]) == (
        "The same arithmetic, and the same weights, to the bit. The losses of all 10 common steps are equal."
    )


def test_a_comparison_names_the_first_step_whose_loss_differs(tmp_path):
    wrong = [{**event, "loss": 9.0} if event.get("step") == 4 and "loss" in event else event for event in story()]
    wrong[-1] = {**wrong[-1], "result": {"weights_sha256": "6" * 64}}
    one, two = make_run(tmp_path / "one", story()), make_run(tmp_path / "two", wrong)
    assert verdict_of([one, two]) == (
        "The same arithmetic, and different weights. The first loss that differs is that of step 4."
    )


def test_a_comparison_of_unfinished_runs_claims_no_weights(tmp_path):
    one, two = make_run(tmp_path / "one", story()), make_run(tmp_path / "two", [started()])
    assert verdict_of([one, two]) == "The same arithmetic; not every run has ended with weights to compare."


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    one, two = make_run(tmp_path / "a" / "run", story()), make_run(tmp_path / "b" / "run", story())
    page = write([one, two]).read_text(encoding="utf-8")
    assert re.findall(r'data-run="([^"]*)"', page) == ["a/run", "b/run"]


def test_what_train_returned_goes_before_the_log(run):
    (run.path / "result.json").write_text('{"weights_sha256": "cafe"}')
    assert '<dd data-figure="weights">cafe</dd>' in write([run]).read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match=r"^cannot write the report '.*missing.*': No such file or directory\.$"):
        write([run], tmp_path / "missing" / "report.html")
    with pytest.raises(UserError, match="at least one run"):
        write([])


def test_a_failed_write_leaves_the_old_report(run, monkeypatch):
    before = write([run]).read_bytes()
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="No space left"):
        write([run])
    assert run.report.read_bytes() == before
    assert not list(run.path.glob(".report*"))


def test_a_report_can_be_written_again_after_the_run_has_moved(run, tmp_path):
    write([run])
    moved = tmp_path / "elsewhere"
    shutil.copytree(run.path, moved)
    assert read_curves(type(run)(moved).events()) == read_curves(run.events())
