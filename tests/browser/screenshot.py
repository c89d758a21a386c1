"""A picture of the demo's page: `python -m tests.browser.screenshot --checkpoint=W --output=docs/demo.png`."""

import argparse
from pathlib import Path

from tests.browser.chromium import open_browser, serve
from tests.browser.page import Page

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--text", default="def read_lines(path):\n")
parser.add_argument("--set", action="append", default=[], help="NAME=VALUE: an option of the page")
parser.add_argument("--token", type=int, default=0, help="whose probabilities are shown")
parser.add_argument("--width", type=int, default=960)


def main() -> None:
    args = parser.parse_args()
    with serve(args.checkpoint) as address, open_browser(args.width, 600) as driver:
        page = Page(driver, address)
        for option in args.set:
            page.set(*option.split("=", 1))
        for _ in range(2):  # the second time nothing is compiled
            page.ask(args.text)
            page.wait(page.find("go").is_enabled)
        print(page.find("status").text, page.find("error").text)
        page.all(".token")[args.token].click()
        page.run("document.activeElement.blur()")
        # As high as the page: a window is higher than what it shows.
        height = page.run("return outerHeight - innerHeight + document.body.offsetHeight")
        driver.set_window_size(args.width, height)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(args.output))


if __name__ == "__main__":
    main()
