"""A run's page in headless Chromium: all of it is there, nothing is fetched, nothing runs, and it fits wide and narrow screens."""

import http.server
import threading

import pytest

from jaxlm import page
from tests.browser.chromium import CONTRAST_OF, open_browser, requested
from tests.tools.test_report import MARKUP, write_whole_run

pytestmark = pytest.mark.browser
LONG = "an_unbroken_word_that_is_longer_than_any_screen_" * 20

# What sticks out of the page: elements wider than the window, but for those within a box that scrolls.
WIDER = """
return [...document.querySelectorAll("body *")]
  .filter((e) => !e.parentElement.closest(".wide") && e.getBoundingClientRect().right > innerWidth + 0.5)
  .map((e) => e.tagName + " " + e.textContent.slice(0, 40));
"""


# Short cells of tables, such as numbers, that are broken into several lines.
BROKEN = """
return [...document.querySelectorAll("td")]
  .filter((e) => e.textContent.length <= 12 && e.firstChild)
  .filter((e) => { const r = document.createRange(); r.selectNodeContents(e); return r.getClientRects().length > 1; })
  .map((e) => e.textContent);
"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as driver:
        yield driver


def set_width(driver, width):
    """Of what a page has: a headless window cannot be narrower than 500, a device that is emulated can."""
    metrics = dict(width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_page(driver, workdir):
    address = page.write_page(workdir).as_uri()
    requested(driver)
    driver.get_log("browser")
    driver.get(address)
    return address


def check_page(driver, address, narrow):
    """Every section and every picture is seen, nothing else was asked for, and the console is silent."""
    set_width(driver, 390 if narrow else 1280)
    for title in page.sections.SECTIONS:
        section = driver.find_element("id", title.lower())
        assert section.is_displayed() and section.size["height"] > 40, title
    assert driver.execute_script("return [...document.images].every((i) => i.naturalWidth > 100)")
    assert driver.execute_script(WIDER) == []
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert driver.execute_script(BROKEN) == []
    assert all(a == address or a.startswith("data:") for a in requested(driver))
    assert [entry["message"] for entry in driver.get_log("browser")] == []


@pytest.mark.parametrize("said", [pytest.param(MARKUP, marks=pytest.mark.smoke), LONG, "a text"])
def test_a_page_is_whole_and_fits_on_every_screen(said, browser, tmp_path):
    address = open_page(browser, write_whole_run(tmp_path / "run", said))
    for narrow in (False, True):
        check_page(browser, address, narrow)
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements("css selector", "main script, main img:not([src^='data:'])") == []


@pytest.fixture
def server():
    """An address of this machine, and the list of what was asked of it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()


@pytest.mark.parametrize("has_policy", [True, False])
def test_a_policy_stops_what_no_escape_has_stopped(has_policy, browser, server, tmp_path):
    """A script and a foreign picture, put into the page: neither is run or asked for, where both would be without it."""
    address, asked = server
    path = page.write_page(write_whole_run(tmp_path / "run"))
    wrong = f'<script>window.hacked = 1</script><img src="{address}/picture.png">'
    text = path.read_text().replace("<main>", f"<main>{wrong}")
    path.write_text(text if has_policy else text.replace("Content-Security-Policy", "nothing"))
    browser.get_log("browser")
    browser.get(path.as_uri())  # returns when all pictures have come, or have not
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert browser.execute_script("return window.hacked") == (None if has_policy else 1)
    assert asked == ([] if has_policy else ["/picture.png"])
    if has_policy:
        assert len(said) == 2 and all("Content Security Policy" in message for message in said)


def test_tables_that_are_folded_open_and_links_lead_to_sections(browser, tmp_path):
    open_page(browser, write_whole_run(tmp_path / "run"))
    set_width(browser, 1280)
    field = "//td[text()='optimizer.learning_rate']"
    assert not browser.find_element("xpath", field).is_displayed()
    browser.find_element("xpath", "//summary[starts-with(., 'All ')]").click()
    assert browser.find_element("xpath", field).is_displayed()
    links = browser.find_elements("css selector", "nav a")
    assert len(links) == len(page.sections.SECTIONS)
    links[-1].click()
    top = browser.execute_script(
        "return document.getElementById('environment').getBoundingClientRect().top"
    )
    assert 0 <= top < 800


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_in_light_and_in_dark(theme, browser, tmp_path):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    open_page(browser, write_whole_run(tmp_path / "run"))
    assert browser.execute_script(CONTRAST) >= 4.5


# The least contrast of a text and what lies behind it.
CONTRAST = (
    CONTRAST_OF
    + """
function behind(element) {
  const colour = getComputedStyle(element).backgroundColor;
  return colour === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : colour;
}
return Math.min(...[...document.querySelectorAll("h1, p, dt, dd, a, h2, h3, td, th, pre, figcaption, summary")].map(
  (e) => contrast(getComputedStyle(e).color, behind(e))
));
"""
)
