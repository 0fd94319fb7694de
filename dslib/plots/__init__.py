"""All figures and tables of the book, and the panes whose sliders work without a kernel.

networks       Which blocks are kept, what each costs, how they are merged.
borders        What merging does at the border of a feature map.
search         Searching, ranking and planning: which blocks to keep, and by which method.
calibration    Networks calibrated without labels.
training       Activations that fade, statistics that drift, curves, gains, hours.
speed          What was measured on a device.
frontier       Accuracy over speed: ours, others', and the published one.
tables         Records laid out as tables.
widgets        Sliders that work in the static page, with no kernel, and compute live with one.
drawing        What all figures share: colours, an empty figure, its legend, and how it becomes SVG.
"""

from .borders import border_errors, border_now, border_panes, inputs_of, plot_border, three_merges
from .calibration import depth_panes, plot_depths, plot_fit, plot_over_images, speed_panes
from .drawing import to_svg
from .frontier import (
    Panel,
    describe_rivals,
    fastest,
    from_nothing_last,
    frontier_points,
    lead,
    panel_titles,
    panels_of,
    plot_frontier,
    plot_reading,
    plot_rivals,
    plot_runs,
    published,
    published_pane,
)
from .networks import (
    mask_pane,
    plot_chains,
    plot_costs,
    plot_growth,
    plot_kernels,
    plot_mask,
    plot_masks,
    predicted_panes,
)
from .search import (
    epoch_panes,
    hue,
    plot_latency_weight,
    plot_methods,
    plot_plans,
    plot_search,
    plot_widths,
    weight_panes,
)
from .speed import (
    by_model,
    case_panes,
    dense_rows,
    mask_speeds,
    plot_blocks,
    plot_prediction,
    plot_roofline,
    plot_speedups,
    plot_steps,
    roofline_of,
    timed,
)
from .tables import (
    ablation_runs,
    ablation_table,
    borders_tables,
    exact_table,
    expansion_table,
    lab_groups,
    machines_table,
    records_table,
    runs_table,
    speedup_table,
    starts_table,
    stored_timings,
)
from .training import (
    fade_panes,
    hours_pane,
    plot_curves,
    plot_drift,
    plot_fade,
    plot_functions,
    plot_gains,
    plot_hours,
    plot_over_fade,
)
from .widgets import explore, explore_two
