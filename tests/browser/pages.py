"""The built pages, a server of them, and a Chromium; shared by the tests and by record_pages.py."""

import functools
import gzip
import http.server
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.glob("book/*.html"))
OFF = ["gpu", "quic", "background-networking", "component-update", "sync"]
FLAGS = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in OFF)]


@contextmanager
def chromium():
    """A Chromium with an empty profile."""
    names = [os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome"]
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        raise RuntimeError("expected a Chromium, found none: apt install chromium, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on stderr for each."""

    def log_message(self, *args):
        """Say nothing."""


@contextmanager
def served():
    """The address of a server of the built pages."""
    handler = functools.partial(Quiet, directory=str(HTML))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def open_page(tab, url: str) -> None:
    """Open a page and wait until formulas are set and nothing loads any more."""
    tab.goto(url, wait_until="networkidle")
    tab.wait_for_function("!window.MathJax || MathJax.startup?.promise?.then(() => true)")


def weight(tab, url: str) -> int:
    """Bytes of all files that a page loads by itself, each gzipped, as a server would send them."""
    asked = set()
    tab.on("request", lambda request: asked.add(urlparse(request.url)))
    open_page(tab, url)
    files = {HTML / unquote(address.path).lstrip("/") for address in asked if address.scheme == "http"}
    return sum(len(gzip.compress(path.read_bytes())) for path in files if path.is_file())
