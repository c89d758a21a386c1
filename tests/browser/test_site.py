"""The documentation site in headless Chromium: pictures are seen whole, nothing is fetched from elsewhere, the console is silent."""

import functools
import http.server
import threading

import pytest

from tests.browser.chromium import open_browser, requested
from tests.docs.walk import build_site

pytestmark = pytest.mark.browser
PAGES = (
    "",
    "readme/",
    "batch/",
    "objectives/mlm/",
    "objectives/span_corruption/",
    "reference/objectives/",
)

# Pictures and code that one has to scroll to see whole.
CUT = """
return [...document.querySelectorAll(".md-typeset pre > code")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent.slice(0, 40));
"""


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where the site is served on this machine."""
    folder = build_site(tmp_path_factory.mktemp("docs") / "site")
    handler = functools.partial(Silent, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", [1600, 390])
def test_pages_are_whole_and_ask_for_nothing_elsewhere(address, width):
    with open_browser() as driver:
        metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        requested(driver)  # what the browser's own first page has asked for
        for page in PAGES:
            driver.get(address + page)
            assert driver.find_element("tag name", "h1").is_displayed(), page
            assert driver.execute_script(
                "return document.documentElement.scrollWidth <= innerWidth"
            )
            if width > 1000 and page.startswith("objectives/"):
                assert driver.execute_script(CUT) == [], page
        own = (address, "data:", "blob:")
        assert [asked for asked in requested(driver) if not asked.startswith(own)] == []
        assert [entry["message"] for entry in driver.get_log("browser")] == []
