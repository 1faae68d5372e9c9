"""Debian's Chromium, headless, for tests of pages."""

import contextlib
import shutil
import time

import pytest


@contextlib.contextmanager
def browser():
    """A driver; the test is skipped where there is no chromium with its driver."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromium-driver here (Debian packages)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1400,1600",
        "--disable-gpu",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def opened(driver, path):
    """Opens a file and waits until its script is done; returns the seconds that this took."""
    begin = time.monotonic()
    driver.get(f"file://{path}")
    while driver.execute_script("return document.documentElement.dataset.ready") != "yes":
        assert time.monotonic() - begin < 60, driver.get_log("browser")
        time.sleep(0.02)
    return time.monotonic() - begin
