"""The demo's server as a process, and headless Chromium. selenium is imported late: only the browser lane has it."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import tiny

# JavaScript: contrast(colour, other) of two colours as a canvas paints them, 1 to 21 (WCAG 2.1).
CONTRAST_OF = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
function luminance(colour) {
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((byte) => {
    const value = byte / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(colour, other) {
  const [dark, light] = [colour, other].map(luminance).sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}
"""

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-color-profile=srgb"
).split()


@contextlib.contextmanager
def serve(checkpoint: str | Path, *flags: str):
    """Runs tools/demo.py on a free port of this machine; gives its address."""
    command = [sys.executable, "tools/demo.py", f"--checkpoint={checkpoint}", "--port=0", *flags]
    with tempfile.TemporaryFile("w+") as errors:
        server = subprocess.Popen(
            command,
            cwd=tiny.ROOT,
            env=tiny.environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert server.stdout is not None
            words = server.stdout.readline().split()
            errors.seek(0)
            assert words[:1] == ["open"], errors.read()
            yield words[1]
        finally:
            server.send_signal(signal.SIGINT)
            code = server.wait(timeout=60)
            server.stdout.close()
        errors.seek(0)
        said = errors.read()
        assert code == 0 and "Traceback" not in said, said


@contextlib.contextmanager
def open_browser(width: int = 1100, height: int = 800):
    """A selenium driver of a browser that was never used before. It logs its console and its requests."""
    from selenium import webdriver

    found = [path for name in CHROMIUM if (path := shutil.which(name))]
    driver_path = shutil.which("chromedriver")
    if not found or not driver_path:
        pytest.fail("no chromium or chromedriver: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = found[0]
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
        try:
            yield driver
        finally:
            driver.quit()


def requested(driver) -> list[str]:
    """The addresses that pages asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
