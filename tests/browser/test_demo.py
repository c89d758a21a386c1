"""The page of tools/demo.py in headless Chromium, with its real server and tiny models."""

import pytest

from tests import tiny
from tests.browser.chromium import CONTRAST_OF, open_browser, serve
from tests.browser.page import Page
from tests.test_api import random_params, save

pytestmark = pytest.mark.browser
MARKUP = '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">'


def save_tiny(folder, spec, **changes):
    config = tiny.tiny_config(spec, "no store", **changes)
    return save(folder, config, random_params(config))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """The address of a page with a decoder; its texts may be long, so there is time to stop it."""
    long = dict(seq_len=2048, model__max_len=2048)
    folder = save_tiny(tmp_path_factory.mktemp("gpt"), "configs/gpt.py:tiny", **long)
    with serve(folder, "--max_new_tokens=2000") as address:
        yield address


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    with serve(save_tiny(tmp_path_factory.mktemp("bert"), "configs/bert.py:tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with open_browser() as driver:
        yield driver


@pytest.mark.smoke
def test_tokens_appear_with_their_probabilities_and_the_likeliest_others(browser, decoder):
    page = Page(browser, decoder)
    page.find("text").send_keys("def f(")
    page.set("max_new_tokens", 12)
    page.run(
        "window.seen = []; new MutationObserver(() => seen.push(document.querySelectorAll('.token').length))"
        ".observe(part('output'), {childList: true})"
    )
    page.press("CONTROL", "ENTER")
    page.wait(lambda: "12 tokens in" in page.find("status").text)
    assert page.output.startswith("def f(")
    tokens = page.all(".token")
    assert 1 < len(tokens) <= 12
    assert len(set(page.run("return window.seen"))) > 2  # not all at once

    tokens[0].click()
    assert tokens[0].get_attribute("aria-pressed") == "true"
    shown = page.candidates
    assert len(shown) >= 8 and all(name and figure[0].isdigit() for name, figure in shown)
    page.press("ARROW_RIGHT")
    assert page.run("return document.activeElement === document.querySelectorAll('.token')[1]")
    assert page.candidates != shown
    page.press("ENTER")
    assert tokens[1].get_attribute("aria-pressed") == "true"
    assert tokens[0].get_attribute("aria-pressed") == "false"
    page.check_quiet()


@pytest.mark.smoke
def test_words_are_masked_and_their_candidates_ranked(browser, encoder):
    page = Page(browser, encoder)
    page.find("text").send_keys("def name(self")
    page.press("ALT", "m")  # the word at the cursor
    assert page.find("text").get_attribute("value") == "def name([MASK]"
    page.press("HOME")
    page.find("mask").click()
    assert page.find("text").get_attribute("value") == "[MASK] name([MASK]"
    page.set("top_k", 7)
    page.ask()
    places = page.all(".token.place")
    assert len(places) == 2 and "2 masks filled" in page.find("status").text
    assert page.output == f"{places[0].text} name({places[1].text}"
    first = page.candidates
    places[1].click()
    assert len(first) == len(page.candidates) == 7 and page.candidates != first
    page.ask("no mask")
    assert "no [MASK] in it" in page.find("error").text and page.output == ""
    page.check_quiet(statuses=[400])


def test_markup_is_text_wherever_it_comes_from(browser, decoder):
    page = Page(browser, decoder)
    page.set("max_new_tokens", 2)
    page.ask(MARKUP)
    assert page.output.startswith(MARKUP)
    page.run(
        "const token = addToken(arguments[0], 0.5, [{title: arguments[0], said: arguments[0], place: -1,"
        " candidates: [[arguments[0], 0.5]], taken: [arguments[0], 0.1]}]); showChoices(token)",
        MARKUP,
    )
    assert page.find("detail").text.count("<script>") == 4
    page.ask(MARKUP * 40)  # longer than the context: the message has its beginning in it
    assert "<script>" in page.find("error").text and "the context holds" in page.find("error").text
    assert page.run("return window.hacked") is None
    assert page.all("main script, main img") == []
    page.check_quiet(statuses=[400])


def test_a_text_can_be_stopped_and_another_asked_for(browser, decoder):
    page = Page(browser, decoder)
    page.set("max_new_tokens", 2000)
    page.run("part('text').value = 'def '")
    page.find("go").click()
    page.wait(lambda: len(page.all(".token")) > 3)
    assert not page.find("go").is_enabled()
    page.press("ESCAPE")
    page.wait(lambda: page.find("status").text == "Stopped.")
    assert page.find("go").is_enabled() and 3 < len(page.all(".token")) < 1500
    page.set("max_new_tokens", 3)
    page.ask()
    assert "3 tokens in" in page.find("status").text and len(page.all(".token")) <= 3
    page.check_quiet()


def test_what_is_wrong_is_said_on_the_page(browser, decoder):
    page = Page(browser, decoder)
    page.set("temperature", 99)
    page.set("seed", "")
    page.ask("def ")
    said = page.find("error").text
    assert "temperature: expected a number from 0 to 5, found 99" in said and "seed" in said
    assert page.all(".token") == []
    page.check_quiet(statuses=[400])


# The least contrast of text and background over all probabilities.
CONTRAST = (
    CONTRAST_OF
    + """
clearOutput();
const ratios = [];
for (let height = -4; height <= 0; height += 0.1) {
  const style = getComputedStyle(addToken("x", 10 ** height, []));
  ratios.push(contrast(style.color, style.backgroundColor));
}
clearOutput();
return Math.min(...ratios);
"""
)


def test_text_is_legible_on_every_colour_in_light_and_in_dark_and_on_a_narrow_screen(
    browser, decoder
):
    page = Page(browser, decoder)
    themes = []
    for _ in range(2):
        page.find("theme").click()
        themes.append(page.run("return document.documentElement.dataset.theme"))
        assert page.run(CONTRAST) >= 4.5, themes
    assert sorted(themes) == ["dark", "light"]
    page.driver.refresh()
    page.wait(lambda: page.find("go").is_enabled())
    assert page.run("return document.documentElement.dataset.theme") == themes[-1]
    size = browser.get_window_size()
    browser.set_window_size(500, 800)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.set_window_size(size["width"], size["height"])
    page.check_quiet()
