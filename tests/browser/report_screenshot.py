"""A picture of a run's page: `python -m tests.browser.report_screenshot --workdir=W --output=docs/report.png`."""

import argparse
import tempfile
from pathlib import Path

from jaxlm.page import write_page
from tests.browser.chromium import open_browser

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--workdir", required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--width", type=int, default=1220)
parser.add_argument("--height", type=int, default=0, help="0: the whole page")


def main() -> None:
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_browser(args.width, 600) as driver:
        driver.get(write_page(args.workdir, Path(folder, "report.html")).as_uri())
        # As high as the page: a window is higher than what it shows.
        frame = driver.execute_script("return outerHeight - innerHeight")
        whole = driver.execute_script("return document.documentElement.scrollHeight")
        driver.set_window_size(args.width, frame + (args.height or whole))
        driver.execute_script("document.documentElement.style.overflow = 'hidden'")  # no bar
        args.output.parent.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(args.output))


if __name__ == "__main__":
    main()
