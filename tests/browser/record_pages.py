"""Write data/results/pages.json: how long a build takes, how heavy each page is, and how soon it shows something.

`python tests/browser/record_pages.py`, after `python3 dev.py setup`; what was built before is removed first.
"""

import shutil
import statistics
import subprocess
import sys
import time

from pages import HTML, PAGES, ROOT, chromium, open_page, served, weight

from dslib.measuring import this_machine
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


def build() -> float:
    """Seconds of `dev.py book`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "dev.py", "book"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Build with nothing there, and again; open each page several times on a local server; medians."""
    shutil.rmtree(HTML.parent, ignore_errors=True)
    builds = {"cold_build_s": build(), "warm_build_s": build()}
    print(builds)
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
    record = Record("pages", command, config, {"rows": rows, **builds}, this_machine(), commit())
    record.save(ROOT / "data/results/pages.json")


if __name__ == "__main__":
    main()
