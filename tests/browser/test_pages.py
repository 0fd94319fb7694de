"""The built pages as a reader without a network meets them: over HTTP, and as files.

Needs `python3 dev.py book` and a Chromium (CHROMIUM names it); run by `python3 dev.py browser`.
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.glob("book/*.html"))
OFF = ["gpu", "quic", "background-networking", "component-update", "sync"]
FLAGS = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in OFF)]
SLIDER = ".widget-hslider [role=slider]"


def chromium() -> str:
    """The path of a Chromium, or a failure that says how to get one."""
    names = [os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome"]
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.fail("expected a Chromium, found none: apt install chromium, or set CHROMIUM to its path")
    return found


@pytest.fixture(scope="module")
def browser():
    """A Chromium with an empty profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on stderr for each."""

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def http_root():
    """The address of a server of the built pages."""
    handler = functools.partial(Quiet, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(params=["http", "file"])
def root(request, http_root):
    """Where the pages are opened: served, and from disk."""
    return http_root if request.param == "http" else HTML.as_uri()


def is_known(text: str, root: str) -> bool:
    """Whether this is the theme preloading icon fonts, refused for file:; its icons are SVG anyway."""
    return root.startswith("file:") and "/fontawesome/" in text


@pytest.fixture
def tab(browser, root):
    """A tab that notes foreign requests, failed ones and errors; there must have been none."""
    page = browser.new_page()
    seen = []
    local = (root, "data:", "blob:")
    page.on("request", lambda r: r.url.startswith(local) or seen.append(f"asked for {r.url}"))
    page.on("requestfailed", lambda r: seen.append(f"failed: {r.url}"))
    page.on("response", lambda r: r.status < 400 or seen.append(f"{r.status}: {r.url}"))
    page.on("console", lambda m: m.type != "error" or seen.append(f"console: {m.text} {m.location['url']}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    yield page
    page.close()
    assert [text for text in seen if not is_known(text, root)] == []


def open_page(tab, url: str) -> None:
    """Open a page and wait until formulas are set and nothing loads any more."""
    tab.goto(url, wait_until="networkidle")
    tab.wait_for_function("!window.MathJax || MathJax.startup?.promise?.then(() => true)")


def shown(tab) -> list[str]:
    """What every widget of the page shows, its sliders left out."""
    script = "areas => areas.map(a => { a = a.cloneNode(true);"
    script += " a.querySelectorAll('.widget-hslider').forEach(s => s.remove()); return a.innerHTML; })"
    return tab.locator(".widget-subarea").evaluate_all(script)


def press(tab, slider) -> None:
    """Move a slider by one step: to the right, or from its last position to the left."""
    last = slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")
    slider.focus()
    tab.keyboard.press("ArrowLeft" if last else "ArrowRight")
    tab.wait_for_timeout(200)


def test_the_book_is_built():
    assert PAGES, f"expected pages in {HTML}, found none: run `python3 dev.py book`"


@pytest.mark.parametrize("name", PAGES)
def test_page_needs_nothing_from_outside(tab, root, name):
    open_page(tab, f"{root}/{name}")
    assert "DepthShrinker, the book" in tab.title()
    assert tab.locator("mjx-merror").count() == 0
    assert tab.locator("span.math, div.math").count() == 0 or tab.locator("mjx-container svg").count() > 0


@pytest.mark.parametrize("name", PAGES)
def test_every_widget_of_a_page_is_drawn(tab, root, name):
    open_page(tab, f"{root}/{name}")
    views = tab.locator("script[type='application/vnd.jupyter.widget-view+json']").count()
    tab.wait_for_function(f"document.querySelectorAll('.widget-subarea > *').length == {views}")


@pytest.mark.parametrize("name", PAGES)
def test_sliders_change_what_is_seen(tab, root, name):
    open_page(tab, f"{root}/{name}")
    for slider in tab.locator(SLIDER).all():
        before = shown(tab)
        press(tab, slider)
        assert shown(tab) != before


def test_the_front_page_leads_to_the_book(tab, root):
    tab.goto(f"{root}/index.html")
    tab.wait_for_url("**/book/intro.html")
