"""The built pages as a reader without a network meets them: over HTTP, and as files.

Needs `python3 dev.py book` and a Chromium (CHROMIUM names it); run by `python3 dev.py browser`.
"""

from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest
from pages import HTML, PAGES, ROOT, chromium, open_page, served, weight

import dslib

SLIDER = ".widget-hslider [role=slider]"
MOST = 2_000_000  # bytes of a page with all it loads, gzipped
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def browser():
    """A Chromium with an empty profile."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def http_root():
    """The address of a server of the built pages."""
    with served() as address:
        yield address


@pytest.fixture(params=["http", "file"])
def root(request, http_root):
    """Where the pages are opened: served, and from disk."""
    return http_root if request.param == "http" else HTML.as_uri()


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
    assert seen == []


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


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_bars_a_reader(browser, http_root, name, theme):
    """Axe-core finds no serious violation of accessibility."""
    page = browser.new_page(color_scheme=theme)
    open_page(page, f"{http_root}/{name}")
    page.add_style_tag(content="* { transition: none !important; }")  # colours on their way are no one's colours
    page.wait_for_timeout(500)  # the theme makes what scrolls focusable after all has loaded
    page.add_script_tag(path=AXE)
    # docutils puts backlinks into its list of citations
    options = "{exclude: ['.citation-list']}, {resultTypes: ['violations']}"
    found = page.evaluate(f"axe.run({options}).then(found => found.violations)")
    page.close()
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]][:3]) for one in serious] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(browser, http_root, name):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    open_page(page, f"{http_root}/{name}")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_light(browser, http_root, name):
    page = browser.new_page()
    assert weight(page, f"{http_root}/{name}") < MOST
    page.close()


class Links(HTMLParser):
    """Collects where a page's links lead, and its anchors."""

    def __init__(self):
        super().__init__()
        self.targets, self.anchors = [], set()

    def handle_starttag(self, tag, attributes):
        """Note a link, or an anchor."""
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.targets += [
            found[key] for key in ("href", "src") if found.get(key) and tag in ("a", "img", "link", "script")
        ]


def test_links_lead_somewhere():
    pages = {}
    for path in (HTML / name for name in ("index.html", "search.html", "genindex.html", *PAGES)):
        pages[path] = Links()
        pages[path].feed(path.read_text())
    broken = []
    for path, links in pages.items():
        for target in links.targets:
            address, anchor = urldefrag(target)
            if "://" in address or address.startswith(("data:", "mailto:", "javascript:")):
                continue
            place = (path.parent / unquote(address.partition("?")[0])).resolve() if address else path
            if not place.exists() or (anchor and place in pages and unquote(anchor) not in pages[place].anchors):
                broken.append(f"{path.name}: {target}")
    assert broken == []


def test_the_api_has_every_public_name():
    links = Links()
    links.feed((HTML / "book" / "api.html").read_text())
    assert {f"dslib.{name}" for name in dslib.__all__} <= links.anchors
    chapter = Links()
    chapter.feed((HTML / "book" / "three_stages.html").read_text())
    assert "api.html#dslib.merge" in chapter.targets  # names in chapters lead there


def test_the_lab_computes_what_pytorch_does(browser, http_root):
    page = browser.new_page()
    open_page(page, f"{http_root}/book/in_your_browser.html")
    page.click("text=Measure here")
    page.wait_for_function("document.getElementById('lab').dataset.difference", timeout=120_000)
    assert float(page.locator("#lab").get_attribute("data-difference")) < 1e-3
    told = page.locator("#lab table").inner_text()
    assert "your browser" in told
    stored = {path.stem for path in (ROOT / "data" / "networks").glob("*.json")} - {"original"}
    assert all(f"{name}: " in told for name in stored), "what was merged or dropped is said by name"
    page.set_input_files("#lab-file", files=[{"name": "x.png", "mimeType": "image/png", "buffer": page.screenshot()}])
    page.wait_for_selector("#lab-answer li")
    assert page.locator("#lab-answer ol").count() == 3  # the original, and what calibration made of it
    page.set_input_files("#lab-file", files=[{"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"}])
    page.wait_for_selector("text=the file is no picture")
    page.close()


def test_from_a_file_the_lab_says_how_to_serve_it(browser):
    page = browser.new_page()
    open_page(page, f"{HTML.as_uri()}/book/in_your_browser.html")
    assert "python3 dev.py serve" in page.locator("#lab").inner_text()
    page.close()


def test_a_lab_without_its_files_says_what_is_missing(browser, http_root):
    page = browser.new_page()
    page.route("**/vendor/ort/**", lambda route: route.abort())
    open_page(page, f"{http_root}/book/in_your_browser.html")
    page.click("text=Measure here")
    page.wait_for_selector("text=ONNX Runtime Web is not here")
    page.close()
