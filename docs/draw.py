"""Draw the README's figure, on a light page and on a dark one, from its record: `python docs/draw.py`."""

from pathlib import Path

from dslib import plots
from dslib.records import Record

FOLDER = Path(__file__).parent
RECORD = FOLDER.parent / "data" / "results" / "frontier-imagenette.json"
NAMES = {
    "planner": "ours: planned",
    "layers": "whole blocks removed",
    "uniform": "uniformly narrower",
    "metapruning": "MetaPruning",
    "depthshrinker": "the paper's search",
}
INKS = {"light": "#1f2328", "dark": "#e6edf3"}


def draw() -> dict[str, str]:
    """File name -> SVG."""
    record = Record.load(RECORD)
    frame = plots.frontier_points(record)
    original = next(row["accuracy"] for row in record.values["rows"] if row.get("way") == "original")
    alt = plots.describe_rivals(frame, NAMES)
    figures = {page: plots.plot_rivals(frame, original, NAMES, ink) for page, ink in INKS.items()}
    return {f"frontier-{page}.svg": plots.to_svg(figure, alt) + "\n" for page, figure in figures.items()}


if __name__ == "__main__":
    for name, svg in draw().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
