"""The web page in a real browser: an example image, a streamed answer, the map, two images side by side."""

from __future__ import annotations

import shutil
import time

import pytest

from tests.serve.conftest import running

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -r requirements-serve.txt")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None or DRIVER is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1000,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the page does not get there"
        time.sleep(0.05)
    return found


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def ask(browser, question):
    find(browser, "#question")[0].send_keys(question)
    find(browser, "#send")[0].click()


def test_the_page_answers_about_an_image(browser, served):
    browser.get(served[1] + "/")
    until(lambda: "tiny" in find(browser, "#model")[0].text)
    find(browser, ".side[data-side='0'] .examples canvas")[0].click()
    until(lambda: "darkest" in find(browser, ".side[data-side='0'] .mapnote")[0].text)
    find(browser, "#two")[0].click()
    find(browser, ".side[data-side='1'] .examples canvas")[1].click()
    until(lambda: "darkest" in find(browser, ".side[data-side='1'] .mapnote")[0].text)
    ask(browser, "what color is the shape?")
    answers = until(lambda: len(found := find(browser, ".assistant[data-done]")) == 2 and found)
    assert all(answer.text for answer in answers) and answers[0].text != answers[1].text
    drawn = browser.execute_script(
        "const c = document.querySelector('.map'); return [...c.getContext('2d').getImageData(60, 10, 20, 20).data]"
    )
    assert any(drawn)
    find(browser, "#clear")[0].click()
    assert not find(browser, ".talk li")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_page_asks_for_the_key_and_shows_errors(browser, loaded):
    with running(loaded, api_key="s3cret") as (_, address):
        browser.get(address + "/")
        key = until(lambda: (found := find(browser, "#key")) and found[0].is_displayed() and found[0])
        assert "API key" in find(browser, "#error")[0].text
        key.send_keys("s3cret\t")
        until(lambda: "tiny" in find(browser, "#model")[0].text)
