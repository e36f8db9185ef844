"""The report page as a reader has it: opened from disk in a real browser, without a network."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from logbook import committed, evaluated, make_run, started, story
from made_up_traffic import run as traffic
from made_up_traffic import sample

from shoal.observe.report import write
from shoal.observe.units import figure

pytestmark = pytest.mark.slow
PLANTED = '<script>window.planted = 1</script><img src=x onerror="window.planted = 1">'


@pytest.fixture(scope="module")
def long_story():
    """Four hundred steps whose loss falls from 4; the sample and the host are hostile."""
    events = [started(host=PLANTED, steps=400), *(committed(step) for step in range(1, 401))]
    events += [evaluated(step, loss=4.5 / step, accuracy=step / 500) for step in range(50, 401, 50)]
    events += [{"time": 401.0, "event": "sampled", "step": 400, "text": PLANTED}]
    return [*events, {"time": 402.0, "event": "ended", "step": 400, "result": {"weights_sha256": "5" * 64}}]


def opened(browser, page: Path) -> None:
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier pages left there
    browser.get(page.as_uri())


def requests(browser) -> Iterator[str]:
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


@contextmanager
def media(browser, **what: object) -> Iterator[None]:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", what)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def becomes(browser, selector: str, visible: bool) -> bool:
    """Waits until the first such element is visible, or is not; raises when it stays as it is."""
    from selenium.webdriver.support.wait import WebDriverWait

    script = "return document.querySelector(arguments[0]).checkVisibility()"
    return WebDriverWait(browser, 10).until(lambda _: browser.execute_script(script, selector) == visible)


def find(browser, selector: str):
    return browser.find_elements("css selector", selector)


@pytest.fixture(scope="module")
def page(tmp_path_factory, long_story):
    return write([make_run(tmp_path_factory.mktemp("runs") / "long", long_story)])


def test_the_page_opens_from_disk_without_errors_and_without_other_requests(browser, page):
    opened(browser, page)
    own = ("data:", "chrome:", "about:")  # the empty icon, and the browser's first tab
    assert {url for url in requests(browser) if not url.startswith(own)} == {page.as_uri()}
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.planted") is None
    assert PLANTED in find(browser, "#samples pre")[0].text


def test_the_headline_shows_the_figures_of_the_log(browser, page, long_story):
    opened(browser, page)
    shown = {tile.get_attribute("data-figure"): tile for tile in find(browser, ".tile")}
    last = [event for event in long_story if event["event"] == "committed"][-1]
    assert float(shown["loss"].get_attribute("data-value")) == last["loss"]
    assert figure(last["loss"]) in shown["loss"].text
    assert float(shown["validation.loss"].get_attribute("data-value")) == 4.5 / 400
    assert float(shown["validation.accuracy"].get_attribute("data-value")) == 0.8
    assert float(shown["steps"].get_attribute("data-value")) == 400
    assert float(shown["parameters"].get_attribute("data-value")) == long_story[0]["parameters"]
    assert find(browser, '[data-figure="weights"]')[0].text == "5" * 64


def test_pointing_at_a_curve_reads_its_values_and_leaving_it_clears_them(browser, page, long_story):
    from selenium.webdriver import ActionChains

    opened(browser, page)
    area = find(browser, ".plot:not([hidden]) .area")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    ActionChains(browser).move_to_element(area).perform()
    reading = find(browser, ".reading")[0].text
    step = int(re.search(r"step (\d+)", reading)[1])
    assert 195 <= step <= 206  # the middle of 400
    train = float(re.search(r"train\s+([\d.]+)", reading)[1])
    assert train == pytest.approx(4.0 / step, rel=1e-4)
    assert re.search(r"validation( \(step 200\))?\s+0\.0225", reading)
    assert len(find(browser, ".spot")) == 2
    ActionChains(browser).move_to_element(find(browser, "h1")[0]).perform()
    assert find(browser, ".reading, .cross, .spot") == []


def test_the_arrow_keys_move_the_reading_a_step_at_a_time(browser, page):
    opened(browser, page)
    area = find(browser, ".plot:not([hidden]) .area")[0]
    area.send_keys("\ue014", "\ue014", "\ue014", "\ue012")  # right three times, left once
    assert "step 2" in find(browser, ".reading b")[0].text
    area.send_keys("\ue00c")  # escape
    assert find(browser, ".reading") == []


def test_a_series_can_be_hidden_and_shown_again(browser, page):
    opened(browser, page)
    key = find(browser, ".chart .key")[0]
    raw = find(browser, '.plot:not([hidden]) [data-series="0"]')[0]
    assert raw.is_displayed()
    key.click()
    assert key.get_attribute("aria-pressed") == "false"
    assert not raw.is_displayed()
    key.click()
    assert raw.is_displayed()


def test_log_scale_and_smoothing_can_be_switched(browser, page):
    opened(browser, page)
    chart = find(browser, ".chart")[0]
    before = chart.find_elements("css selector", '.plot[data-scale="linear"]')[0]
    after = chart.find_elements("css selector", '.plot[data-scale="log"]')[0]
    assert (before.is_displayed(), after.is_displayed()) == (True, False)
    chart.find_element("css selector", '[data-tool="log"]').click()
    assert (before.is_displayed(), after.is_displayed()) == (False, True)
    mean = after.find_element("css selector", ".mean")
    assert mean.is_displayed()
    chart.find_element("css selector", '[data-tool="smooth"]').click()
    assert not mean.is_displayed()
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_the_window(browser, page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened(browser, page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_is_whole_without_scripts(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, page)
        assert find(browser, ".plot:not([hidden]) path.line")[0].is_displayed()
        assert not find(browser, ".tools")[0].is_displayed()
        assert "1.0 %" not in find(browser, "#speed")[0].text
        assert "10.0 %" in find(browser, "#speed .waits")[0].text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_light_and_dark_follow_the_reader(browser, page):
    grounds = []
    for scheme in ("light", "dark"):
        with media(browser, features=[{"name": "prefers-color-scheme", "value": scheme}]):
            opened(browser, page)
            grounds.append(find(browser, "body")[0].value_of_css_property("background-color"))
    light, dark = ([int(part) for part in re.findall(r"\d+", ground)[:3]] for ground in grounds)
    assert min(light) > 200
    assert max(dark) < 60


def test_on_paper_every_section_is_open_and_the_tools_are_gone(browser, tmp_path):
    page = write([make_run(tmp_path / name, story()) for name in ("one", "two")])
    opened(browser, page)
    assert becomes(browser, "#recipe details .settings", visible=False)
    with media(browser, media="print"):  # takes effect with the browser's next frame
        assert becomes(browser, "#recipe details .settings", visible=True)
        assert becomes(browser, ".tools", visible=False)


def test_a_comparison_has_both_runs_in_its_legends_and_reads_both(browser, tmp_path):
    from selenium.webdriver import ActionChains

    one = make_run(tmp_path / "one-worker", story(), workers=1)
    two = make_run(tmp_path / "four-workers", story(), workers=4)
    page = write([one, two])
    opened(browser, page)
    assert browser.get_log("browser") == []
    legends = [
        [key.text for key in legend.find_elements("css selector", ".key")] for legend in find(browser, ".legend")
    ]
    assert legends[0] == ["one-worker", "four-workers"]
    assert "to the bit" in find(browser, ".verdict")[0].text
    losses = find(browser, 'tr[data-run] td[data-figure="loss"]')
    assert [float(cell.get_attribute("data-value")) for cell in losses] == [0.4, 0.4]
    area = find(browser, ".plot:not([hidden]) .area")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    ActionChains(browser).move_to_element(area).perform()
    reading = find(browser, ".reading")[0].text
    assert "one-worker · train" in reading
    assert "four-workers · train" in reading


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """A run of four workers, of whom one is late, with a sampled step of many buckets."""
    waits = [[0.03 if peer == 2 != rank else 0.0 for peer in range(4)] for rank in range(4)]
    each = {"placement": (2,) * 4, "loading": (0.0,) * 4, "updating": (0.001,) * 4}
    events = traffic(**each, compute=(0.05, 0.05, 0.08, 0.05), waits=waits, transferring=0.004, hidden=0.01)
    events[-1]["comm"]["sample"] = sample(11, workers=4, buckets=40)
    return write([make_run(tmp_path_factory.mktemp("runs") / "exchanged", events)])


def test_the_section_on_communication_is_read_from_top_to_bottom(browser, exchanged):
    opened(browser, exchanged)
    assert browser.get_log("browser") == []
    finding = find(browser, "#communication .finding")[0]
    assert finding.text.startswith("The others stand still 30 ms (30.0 %) of each step for rank 2")
    order = [
        finding,
        *(find(browser, f"#communication {what}")[0] for what in (".remedies", ".traffic", ".matrix", ".lanes")),
    ]
    tops = [element.rect["y"] for element in order]
    assert tops == sorted(tops)
    gains = [float(row.get_attribute("data-gain")) for row in find(browser, "#communication [data-remedy]")]
    assert gains == sorted(gains, reverse=True)
    assert len(gains) > 0
    late = find(browser, ".matrix [data-seconds='0.03']")
    calm = find(browser, ".matrix [data-seconds='0.0']")
    colours = [cell.value_of_css_property("background-color") for cell in (late[0], calm[0])]
    assert colours[0] != colours[1]


@pytest.mark.parametrize("width", [380, 1280])
def test_where_a_step_goes_and_what_would_help_are_seen_whole_on_a_phone(browser, exchanged, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    tables = "[...document.querySelectorAll('.scroll:has(.spent, .remedies)')]"
    cut = f"return {tables}.map(e => e.scrollWidth - e.clientWidth)"
    try:
        opened(browser, exchanged)
        assert browser.execute_script(cut) == [0, 0]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [420, 1280])
def test_the_picture_of_a_step_fits_and_shows_every_bucket(browser, exchanged, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened(browser, exchanged)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        lanes = find(browser, ".lane svg")
        assert len(lanes) == 8  # four workers, the whole step and the end of it
        shapes = [rect.rect for rect in lanes[4].find_elements("css selector", "rect")]
        assert len(shapes) >= 3 * 40
        box = lanes[4].rect
        assert all(
            box["x"] - 1 <= shape["x"] and shape["x"] + shape["width"] <= box["x"] + box["width"] + 1
            for shape in shapes
        )
        assert all(shape["height"] > 0.5 for shape in shapes)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_an_injected_script_would_be_refused_by_the_page_itself(browser, tmp_path, page):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace("<main>", f"<main>{PLANTED}"), encoding="utf-8")
    opened(browser, broken)
    assert browser.execute_script("return window.planted") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
