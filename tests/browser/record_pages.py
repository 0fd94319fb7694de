"""Write data/results/pages.json: how heavy each built page is, and how soon it shows something.

`python tests/browser/record_pages.py`, after `python3 dev.py book`.
"""

import statistics

from pages import PAGES, ROOT, chromium, open_page, served, weight

from dslib.devices import this_machine
from dslib.records import Record, commit

TIMES = 5  # openings of each page, an empty cache each time
METRICS = """new Promise(resolve => {
    let largest = 0, shifted = 0;
    new PerformanceObserver(list => list.getEntries().forEach(entry => largest = entry.startTime))
        .observe({type: "largest-contentful-paint", buffered: true});
    new PerformanceObserver(list => list.getEntries().forEach(entry => shifted += entry.value))
        .observe({type: "layout-shift", buffered: true});
    setTimeout(() => resolve({
        first_contentful_paint_ms: performance.getEntriesByName("first-contentful-paint")[0].startTime,
        largest_contentful_paint_ms: largest, layout_shift: shifted,
        loaded_ms: performance.getEntriesByType("navigation")[0].loadEventEnd}), 200);
})"""


def main() -> None:
    """Open each page several times on a local server; medians."""
    rows = []
    with chromium() as browser, served() as root:
        for name in PAGES:
            url, found = f"{root}/{name}", []
            for _ in range(TIMES):
                tab = browser.new_context().new_page()
                open_page(tab, url)
                found.append(tab.evaluate(METRICS))
                tab.context.close()
            tab = browser.new_context().new_page()
            medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append({"page": name, "gzipped_bytes": weight(tab, url), **medians})
            tab.context.close()
            print(f"{name}: {rows[-1]['gzipped_bytes'] / 1e6:.2f} MB, {medians['first_contentful_paint_ms']:.0f} ms")
        config = {"times": TIMES, "browser": f"Chromium {browser.version}, headless", "server": "http.server, local"}
    command = "python tests/browser/record_pages.py"
    Record("pages", command, config, {"rows": rows}, this_machine(), commit()).save(ROOT / "data/results/pages.json")


if __name__ == "__main__":
    main()
