"""The page at / as a person uses it: in a real browser, against real servers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serve.saved_runs import gpt_run, image_run

import shoal
from shoal.models.bert import Head

pytestmark = pytest.mark.slow


def waited(browser: Any, script: str) -> Any:
    """The value of the script once it is not empty."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(f"return {script}"))


def type_and_send(browser: Any, **fields: str) -> None:
    waited(browser, '!!document.querySelector("form").onsubmit')
    for name, text in fields.items():
        field = browser.find_element("id", name)
        field.clear()
        field.send_keys(text)
    browser.find_element("css selector", "form button").click()


@pytest.fixture
def quiet(browser: Any) -> Iterator[None]:
    browser.get_log("browser")
    yield
    assert [
        entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "favicon" not in str(entry)
    ] == []


def test_a_text_is_typed_and_its_classes_are_seen(
    browser: Any,
    quiet: None,
    folders: Callable[[Head], Path],
) -> None:
    with shoal.serve(folders("classification")) as server:
        browser.get(server.url)
        type_and_send(browser, text="who is red")
        rows = waited(browser, "document.querySelectorAll('#result .row').length")
        assert rows == 3
        browser.get(f"{server.url}/docs")
        assert "/predict" in waited(browser, "document.querySelector('#paths section') && document.body.innerText")


def test_a_digit_is_drawn_and_its_classes_are_seen(browser: Any, quiet: None, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    with shoal.serve(image_run(tmp_path)) as server:
        browser.get(server.url)
        waited(browser, '!!document.querySelector("form").onsubmit')
        canvas = browser.find_element("id", "image")
        ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(30, 40).release().perform()
        browser.find_element("css selector", "form button").click()
        assert waited(browser, "document.querySelectorAll('#result .row').length") == 4


def test_a_text_is_begun_and_its_continuation_streams_in(browser: Any, quiet: None, tmp_path: Path) -> None:
    with shoal.serve(gpt_run(tmp_path)) as server:
        browser.get(server.url)
        type_and_send(browser, prompt="the ", most="12")
        waited(browser, "document.querySelector('#result pre')?.textContent.length == 16")
