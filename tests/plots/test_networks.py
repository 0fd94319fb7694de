"""Figures and sliders: what they show is what they were given."""

import numpy as np
import pandas as pd
import pytest

import dslib
from dslib import plots
from dslib.errors import BadConfig

MASKS = {k: dslib.Mask({f"block.{i}": i < k for i in range(4)}) for k in range(5)}
HISTORY = [{"m": [1.2, 0.9], "kept": ["a"]}, {"m": [1.5, 0.8], "kept": ["a"]}]
ROW = {"images_per_s": 100.0, "accuracy": 0.9}
FRAME = pd.DataFrame({"kept_ms": [3.0, 2.0], "linear_ms": [2.5, 1.5], "merged_ms": [1.0, 1.8]}, index=["a", "b"])


def test_bars_are_as_long_as_the_costs():
    axes = plots.plot_costs(FRAME, 32).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [3.0, 2.0, 2.5, 1.5, 1.0, 1.8]
    assert axes.get_xlabel() == "latency, ms per batch of 32"


def test_masks_are_drawn_row_by_row():
    axes = plots.plot_masks(MASKS).axes[0]
    drawn = np.asarray(axes.collections[0].get_array()).reshape(5, 4)
    assert drawn.sum(1).tolist() == [0, 1, 2, 3, 4]


def test_a_mask_is_three_layers_a_kept_block_and_one_a_merged():
    assert len(plots.plot_mask(MASKS[3]).axes[0].patches) == 3 * 3 + 1
    assert len(plots.plot_mask(MASKS[2], linear={"block.3"}).axes[0].patches) == 3 * 3 + 1
    axes = plots.plot_mask(MASKS[2], dropped=MASKS[2].removed[:1]).axes[0]
    assert sorted(box.get_height() for box in axes.patches)[0] < 0.1
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "dropped"


def test_a_search_is_one_line_a_site():
    lines = plots.plot_search(dslib.Importances({"a": 1.5, "b": 0.8}, (), ("a", "b"), HISTORY)).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [[1.0, 1.2, 1.5], [1.0, 0.9, 0.8]]


def test_names_at_a_searchs_end_do_not_cover_each_other():
    names = [f"site{i}" for i in range(17)]
    ends = [1.0 + 0.001 * i for i in range(16)] + [1.4]
    history = [{"m": [1.0] * 16 + [0.8], "kept": names[:3]}, {"m": ends[::-1], "kept": names[:3]}]
    texts = (
        plots.plot_search(dslib.Importances(dict(zip(names, ends[::-1], strict=True)), (), tuple(names), history))
        .axes[0]
        .texts
    )
    places = {text.get_text(): text.xyann[1] for text in texts}
    assert sorted(places, key=places.get) == names[::-1], "in the order of the lines"
    assert min(np.diff(sorted(places.values()))) > 0.6 / 27
    assert places["site0"] == pytest.approx(1.4), "what is far from others stays"
    assert all(text.xy[1] == ends[::-1][names.index(text.get_text())] for text in texts), "each points to its line"


def test_maps_kernels_and_runs():
    error = np.zeros((5, 5))
    error[0] = 0.3
    assert plots.plot_border({"one": error, "two": error / 2}).axes[0].images[0].get_clim() == (0.0, 0.3)
    assert plots.plot_kernels({"k": np.array([[1.0, -2.0]])}).axes[0].images[0].get_clim() == (-2.0, 2.0)
    speed = {"ratio_of_medians": 1.5, "q25": 1.4, "q75": 1.7}
    run = {
        "k": 8,
        "batch_size": 32,
        "speedup": speed,
        "networks": {"original": ROW, "merged": {**ROW, "accuracy": 0.8}},
    }
    axes = plots.plot_runs([run]).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines[:2]] == [[[1.0, 90.0]], [[1.5, 80.0]]]
    np.testing.assert_allclose(axes.collections[0].get_segments()[0], [[1.4, 80.0], [1.7, 80.0]])


def test_growth_is_drawn_in_thousands():
    frame = pd.DataFrame({"linear": [1000.0, 2000.0], "merged": [500.0, 4000.0]}, index=[1, 2])
    lines = plots.plot_growth(frame).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [[1.0, 2.0], [0.5, 4.0]]


def test_depths_ranked_and_random_masks():
    accuracy = pd.Series({2: 0.5, 1: 0.25})
    line, points = plots.plot_depths(accuracy, [(1, 0.125)]).axes[0].lines
    assert line.get_xydata().tolist() == [[2.0, 50.0], [1.0, 25.0]]
    assert points.get_xydata().tolist() == [[1.0, 12.5]]


def test_accuracy_over_images_shows_each_seed_and_the_median():
    rows = pd.DataFrame({"images": [16, 16, 16, 64], "accuracy": [0.5, 0.25, 0.75, 0.875]})
    original, middle, points = plots.plot_over_images(rows, 0.9375).axes[0].lines
    assert set(original.get_ydata()) == {93.75}
    assert middle.get_xydata().tolist() == [[16.0, 50.0], [64.0, 87.5]]
    assert points.get_ydata().tolist() == [50.0, 25.0, 75.0, 87.5]


def test_straight_lines_lie_beside_what_is_bent():
    x = np.array([-1.0, 0.0, 3.0])
    dots, first, second = plots.plot_fit(x, x.clip(0), {"torn out": (1.0, 0.0), "fit": (0.5, 1.0)}).axes[0].lines
    assert dots.get_ydata().tolist() == [0.0, 0.0, 3.0]
    assert first.get_xydata().tolist() == [[-1.0, -1.0], [3.0, 3.0]]
    assert second.get_ydata().tolist() == [0.5, 2.5]


def joined(a, b):
    if b not in "xy":
        raise BadConfig(f"no {b}")
    return f"{a}-{b}"


def test_two_sliders_move_rows_and_columns():
    rows = {"a": {"x": "ax", "y": "ay"}, "b": {"x": "bx", "y": "by"}}
    outer, inner, stack = plots.explore_two(rows, "letter", "axis").children
    assert (outer.description, inner.description) == ("letter", "axis")
    assert [[pane.value[-8:-6] for pane in row.children] for row in stack.children] == [["ax", "ay"], ["bx", "by"]]
    outer, _, stack = plots.explore_two(rows, "letter", "axis", start="b").children
    assert (outer.value, stack.selected_index) == ("b", 1)
    outer, inner, _, boxes, button, answer = plots.explore_two(rows, "letter", "axis", live=joined).children
    outer.value, inner.value = "b", "y"
    button.click()
    assert "b-y" in answer.value
    boxes.children[0].value = "between"  # off the grid
    button.click()
    assert "between-y" in answer.value
    boxes.children[1].value = "<z>"
    button.click()
    assert "no &lt;z&gt;" in answer.value
    assert not button.disabled
    with pytest.raises(BadConfig, match="every row needs the same values of 'axis': x, y"):
        plots.explore_two({"a": {"x": "", "y": ""}, "b": {"x": ""}}, "letter", "axis")
    with pytest.raises(BadConfig, match="at least one pane"):
        plots.explore_two({}, "letter", "axis")


def test_chains_show_every_step_in_its_row():
    axes = plots.plot_chains({"many": ["a", "b", "c"], "one": ["d"]}).axes[0]
    places = {text.get_text(): text.get_position() for text in axes.texts if text.get_text()}
    assert places == {"many": (-0.6, 0), "a": (0, 0), "b": (1, 0), "c": (2, 0), "one": (-0.6, -1), "d": (0, -1)}
    assert len(axes.texts) == len(places) + 2  # arrows


def test_svg_text_is_the_same_every_time():
    first, second = (plots.to_svg(plots.plot_mask(MASKS[2])) for _ in range(2))
    assert first == second
    assert first.startswith('<svg role="img" aria-label="diagram" style="max-width: 100%')
    told = plots.to_svg(plots.plot_mask(MASKS[2], "two & three"))
    assert told.startswith('<svg role="img" aria-label="two &amp; three"')
    assert 'aria-label="k = 2"' in plots.to_svg(plots.plot_mask(MASKS[2]), "k = 2")


def test_a_slider_moves_its_panes_in_the_page():
    slider, stack = plots.explore({"1": "one", "2": "<b>two</b>"}, "k", start="2").children
    assert (slider.value, slider.description, stack.selected_index) == ("2", "k", 1)
    assert ["one" in stack.children[0].value, "<b>two</b>" in stack.children[1].value] == [True, True]
    with pytest.raises(BadConfig, match="start is '3', expected one of 1, 2"):
        plots.explore({"1": "", "2": ""}, "k", start="3")
    with pytest.raises(BadConfig, match="at least one pane"):
        plots.explore({}, "k")


def test_with_a_kernel_the_button_computes_the_sliders_value():
    slider, _, button, answer = plots.explore({"1": "", "2": ""}, "k", live=lambda k: f"now {k}").children
    slider.value = "2"
    button.click()
    assert "now 2" in answer.value
    assert not button.disabled
