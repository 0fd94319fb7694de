"""Sliders that work in the static page, with no kernel, and compute live with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .errors import require

if TYPE_CHECKING:
    from ipywidgets import VBox


def explore(
    panes: Mapping[str, str], label: str, start: str | None = None, live: Callable[[str], str] | None = None
) -> VBox:
    """A slider over precomputed panes; the page moves it without a kernel.

    Slider and panes are linked in the browser. With a kernel, `live` computes what the moment asks for (the
    value's pane, anew, on this machine) when its button is pressed.

    Args:
        panes: value -> HTML (text, a table, an SVG), in slider order.
        label: what the slider is over, e.g. 'k, sites kept'.
        start: the value shown first; default the first.
        live: value -> HTML, computed now; the button says that it needs a kernel.
    """
    import ipywidgets

    require(bool(panes), "explore: expected at least one pane")
    values = list(panes)
    require(start is None or start in panes, f"explore: start is {start!r}, expected one of {', '.join(values)}")
    index = values.index(start) if start is not None else 0
    slider = ipywidgets.SelectionSlider(
        options=values, index=index, description=label, style={"description_width": "initial"},
        layout={"width": "min(36em, 95%)"},
    )  # fmt: skip
    # white behind each pane: figures have dark text, and the page may be dark
    stack = ipywidgets.Stack([ipywidgets.HTML(_framed(pane)) for pane in panes.values()], selected_index=index)
    ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    children = [slider, stack]
    if live is not None:
        children += _live_part(slider, live)
    return ipywidgets.VBox(children)


def _live_part(slider: object, live: Callable[[str], str]) -> list[object]:
    """A button that computes the slider's value with the kernel, and the place for its answer."""
    import ipywidgets

    button = ipywidgets.Button(description="compute this one now (needs a kernel)", layout={"width": "max-content"})
    answer = ipywidgets.HTML()

    def compute(_: object) -> None:
        button.disabled, answer.value = True, "computing ..."
        try:
            answer.value = _framed(live(slider.value))  # type: ignore[attr-defined]
        finally:
            button.disabled = False

    button.on_click(compute)
    return [button, answer]


def _framed(pane: str) -> str:
    return f'<div style="background: white; color: black; padding: 0.5em; overflow-x: auto">{pane}</div>'
