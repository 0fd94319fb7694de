"""Sliders that work in the static page, with no kernel, and compute live with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

import ipywidgets
from ipywidgets import HTML, SelectionSlider, Stack, Text, VBox, Widget

from ..errors import BadConfig, DslibError, first_line


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
    slider = _slider(list(panes), label, start)
    stack = _stack([_pane(pane) for pane in panes.values()], slider)
    children = [slider, stack]
    if live is not None:
        children += _live_part([slider], live)
    return ipywidgets.VBox(children)


def explore_two(
    panes: Mapping[str, Mapping[str, str]],
    first: str,
    second: str,
    start: str | None = None,
    live: Callable[[str, str], str] | None = None,
) -> VBox:
    """Two sliders over precomputed panes; the page moves both without a kernel.

    Args:
        panes: value of the first -> value of the second -> HTML; every first value has the same second ones.
        first, second: what the sliders are over.
        start: the first's value that is shown first; default its first.
        live: (first's value, second's) -> HTML, computed now for the values in two boxes, which follow the sliders, or
            hold any others that were typed; the button says that it needs a kernel.
    """
    if not panes:
        raise BadConfig("explore_two: expected at least one pane")
    inner_values = list(next(iter(panes.values())))
    if not all(list(row) == inner_values for row in panes.values()):
        raise BadConfig(f"explore_two: every row needs the same values of {second!r}: {', '.join(inner_values)}")
    outer, inner = _slider(list(panes), first, start), _slider(inner_values, second, None)
    rows = [_stack([_pane(pane) for pane in row.values()], inner) for row in panes.values()]
    children = [outer, inner, _stack(rows, outer)]
    if live is not None:
        boxes = [_box(slider) for slider in (outer, inner)]
        children += [ipywidgets.HBox(boxes, layout={"flex_flow": "wrap"}), *_live_part(boxes, live)]
    return ipywidgets.VBox(children)


def _slider(values: list[str], label: str, start: str | None) -> SelectionSlider:
    if not values:
        raise BadConfig("explore: expected at least one pane")
    if start is not None and start not in values:
        raise BadConfig(f"explore: start is {start!r}, expected one of {', '.join(values)}")
    return ipywidgets.SelectionSlider(
        options=values,
        index=values.index(start) if start is not None else 0,
        description=label,
        style={"description_width": "initial"},
        layout={"width": "min(36em, 95%)"},
    )


def _stack(children: list[Widget], slider: SelectionSlider) -> Stack:
    """The children, of which the page shows the one that the slider points to."""
    stack = ipywidgets.Stack(children, selected_index=slider.index)
    ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    return stack


def _box(slider: SelectionSlider) -> Text:
    """A box to type a value into; it follows the slider."""
    box = ipywidgets.Text(
        slider.value, description=slider.description, style={"description_width": "initial"}, layout={"width": "14em"}
    )
    slider.observe(lambda change: setattr(box, "value", change["new"]), "value")
    return box


def _live_part(inputs: Sequence[SelectionSlider | Text], live: Callable[..., str]) -> list[Widget]:
    """A button that computes the inputs' values with the kernel, and the place for its answer."""
    button = ipywidgets.Button(description="compute this one now (needs a kernel)", layout={"width": "max-content"})
    answer = ipywidgets.HTML()

    def compute(_: object) -> None:
        button.disabled, answer.value = True, "computing ..."
        try:
            answer.value = _framed(live(*(one.value for one in inputs)))
        except (DslibError, ValueError) as error:
            answer.value = _framed(escape(first_line(error)))
        finally:
            button.disabled = False

    button.on_click(compute)
    return [button, answer]


def _pane(html: str) -> HTML:
    return ipywidgets.HTML(_framed(html))


def _framed(html: str) -> str:
    # white behind each pane: figures have dark text, and the page may be dark
    return f'<div style="background: white; color: black; padding: 0.5em; overflow-x: auto">{html}</div>'
