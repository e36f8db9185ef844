"""A headless Chromium for the tests of pages."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


def need(found: str | None, name: str) -> str:
    if found:
        return found
    if os.environ.get("SHOAL_REQUIRE_CHROMIUM") == "1":
        pytest.fail(f"SHOAL_REQUIRE_CHROMIUM=1, but there is no {name} on the PATH")
    pytest.skip(f"no {name} on the PATH; pages are tested in headless Chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = need(shutil.which("chromium") or shutil.which("google-chrome"), "chromium")
    driver_path = need(shutil.which("chromedriver"), "chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in f"{flags} disable-component-update disable-sync disable-dev-shm-usage".split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver_path)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
        assert service.process is None or service.process.poll() is not None, "chromedriver is still running"
