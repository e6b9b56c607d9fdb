"""Figures draw what their frames say: bar heights, line values, limits, labels; importing changes nothing."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from sdtp_lib import plots
from sdtp_lib.pruning.token_fates import TokenFates


def test_importing_plots_changes_no_setting_and_loads_no_torch():
    code = (
        "import sys, matplotlib; before = dict(matplotlib.rcParams); import sdtp_lib.plots; "
        "assert dict(matplotlib.rcParams) == before; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_needle_map_says_mean_and_items_by_depth_and_length_and_leaves_empty_cells_empty(ax):
    frame = pd.DataFrame({"answer_depth": [0.1, 0.15, 0.95, 1.0, None], "target_tokens": [1024, 1024, 1024, 4096, 1024],
                          "score": [1.0, 0.0, 1.0, 0.5, 1.0]})  # fmt: skip
    plots.needle_map(frame, ax, bins=4)
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["50\nn=2", "100\nn=1", "50\nn=1"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0-25", "25-50", "50-75", "75-100"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1,024", "4,096"]
    values = np.ma.filled(ax.collections[0].get_array(), np.nan).reshape(4, 2)
    assert values[0, 0] == 50 and values[3].tolist() == [100, 50] and np.isnan(values[1:3]).all()
    with pytest.raises(ValueError, match="no row has an answer_depth"):
        plots.needle_map(frame.assign(answer_depth=None))
    with pytest.raises(ValueError, match="needle_map needs column"):
        plots.needle_map(frame.drop(columns="score"))


def test_needle_maps_stand_side_by_side_on_one_scale():
    frame = pd.DataFrame({"answer_depth": [0.1, 0.9], "target_tokens": [1024, 4096], "score": [1.0, 0.0]})
    figure = plots.needle_maps({"unpruned": frame, "pruned": frame.assign(score=0.5)})
    first, second, bar = figure.axes
    assert [first.get_title(), second.get_title()] == ["unpruned", "pruned"] and second.get_ylabel() == ""
    assert bar.get_ylabel() == "score [%]" and first.get_ylim() == second.get_ylim()
    plt.close(figure)


def test_the_style_holds_inside_its_block_only():
    before = dict(matplotlib.rcParams)
    with plots.use_style():
        assert matplotlib.rcParams["axes.spines.top"] is False
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"][0] == plots.PALETTE["blue"]
    assert dict(matplotlib.rcParams) == before


def test_a_scorer_keeps_its_colour_whatever_else_is_drawn():
    alone = plots.series_look(["recency"])["recency"]
    among = plots.series_look(["learned", "mine", "recency"])
    assert among["recency"] == alone
    assert len({entry["color"] for entry in among.values()}) == 3


@pytest.mark.parametrize(
    "names",
    [
        ["random", "recency", "hidden norm", "attention", "attention, pooled", "one-layer filter",
         "attention + recency", "paper's pruner", "SDTP"],
        ["recency", *(f"mine {i}" for i in range(12))],
    ],
)  # fmt: skip
def test_more_series_than_colours_are_still_told_apart(names):
    looks = plots.series_look(names).values()
    assert len({(look["color"], look.get("linestyle", "-")) for look in looks}) == len(names)
    assert len({(look["color"], look["marker"]) for look in looks}) == len(names)


def test_points_and_bars_take_dashed_series_too(ax):
    names = ["attention", "attention, pooled"]
    frame = pd.DataFrame({"method": names, "prefill_speedup": [1.5, 2.0], "kl_nats": [0.1, 0.2]})
    plots.pareto(frame, ax)
    assert {line.get_linestyle() for line in ax.lines if line.get_label() in names} == {"None"}
    figure, bars = plt.subplots()
    plots.score_by_group(frame.assign(group="text"), bars, x="group", y="kl_nats", hue="method")
    assert [bar.get_hatch() for bar in bars.patches] == [None, "//"]
    plt.close(figure)


def test_the_heatmap_shows_each_layers_share_of_its_own_maximum(ax):
    plots.saliency_heatmap(np.array([[1.0, 4.0], [-10.0, 5.0]]), ["a", "$b$"], ax=ax, layers=[4, 7])
    assert np.allclose(ax.images[0].get_array(), [[0.25, 1.0], [1.0, 0.5]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["4", "7"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", r"\$b\$"]
    assert ax.get_ylabel() == "layer"


def test_a_long_prompt_is_pooled_by_its_maximum_so_that_one_salient_token_stays_visible(ax):
    values = np.full((2, 1000), 0.01)
    values[1, 777] = 1.0
    plots.saliency_heatmap(values, ax=ax, max_columns=100)
    shown = np.asarray(ax.images[0].get_array())
    assert shown.shape == (2, 100)
    assert shown[1, 77] == 1.0 and shown[1, 76] == pytest.approx(0.01)
    assert "maximum of 10" in ax.get_xlabel()


def test_the_heatmap_reads_a_frame_as_it_reads_an_array(ax):
    frame = pd.DataFrame({"layer": [4, 4, 7, 7], "position": [0, 1, 0, 1], "saliency": [2.0, 1.0, 3.0, 6.0]})
    plots.saliency_heatmap(frame, ax=ax)
    assert np.allclose(ax.images[0].get_array(), [[1.0, 0.5], [0.5, 1.0]])


def test_the_salient_share_counts_tokens_above_a_tenth_of_the_layers_maximum(ax):
    values = {4: [1.0, 0.05, 0.2, np.nan], 7: [1.0, 0.0, 0.0, 0.0]}
    plots.salient_share_by_layer(values, ax=ax)
    line = ax.lines[0]
    assert list(line.get_xdata()) == [4, 7]
    assert np.allclose(line.get_ydata(), [100 * 2 / 3, 25.0])


def test_salient_shares_of_several_labels_are_lines_of_one_legend(ax):
    plots.salient_share_by_layer({"removal": np.eye(2), "gradient": np.ones((2, 4))}, ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["removal", "gradient"]
    assert list(ax.lines[1].get_ydata()) == [100.0, 100.0]


def test_a_column_of_the_map_ends_where_its_token_was_dropped(ax):
    fates = TokenFates(np.array([3, 1, 2]), (1, 2), 3, np.zeros((2, 3)))
    plots.token_layer_map(fates, ax=ax)
    drawn = np.asarray(ax.images[0].get_array())
    assert drawn.tolist() == [[2, 0, 1], [2, -1, 1], [2, -1, -1]]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["before layer 1: 1 tokens", "before layer 2: 1 tokens", "kept to the end: 1 tokens"]


def test_loss_curves_draw_a_line_a_term_and_dash_the_held_out_one(ax):
    frame = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "eval_loss": [np.nan, np.nan, 1.5], "epoch": 1})
    plots.loss_curves(frame, ax)
    by_label = {line.get_label(): line for line in ax.lines}
    assert set(by_label) == {"loss", "eval_loss"}
    assert list(by_label["loss"].get_ydata()) == [3.0, 2.0, 1.0]
    assert by_label["eval_loss"].get_linestyle() == "--" and list(by_label["eval_loss"].get_xdata()) == [3]


def test_recall_is_drawn_as_the_median_of_its_samples_with_chance_beside_it(ax):
    frame = pd.DataFrame({"layer": [4, 4, 4, 7], "recall": [0.1, 0.5, 0.6, 0.8], "scorer": "learned"})
    plots.recall_by_layer(frame, ax, chance=0.1)
    assert np.allclose(ax.lines[0].get_ydata(), [0.5, 0.8])
    assert ax.get_ylim() == (0, 1.02)
    assert "chance (0.1)" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_negative_rank_correlation_is_inside_the_axes(ax):
    frame = pd.DataFrame({"layer": [4, 7], "rank_correlation": [-0.3, 0.8]})
    plots.recall_by_layer(frame, ax, y="rank_correlation")
    assert ax.get_ylim()[0] < -0.3
    assert "correlation" in ax.get_ylabel()


def test_the_speedup_is_drawn_beside_its_limit_in_one_colour(ax):
    frame = pd.DataFrame(
        {"prompt_tokens": [1024, 4096], "prefill_speedup": [1.5, 1.7], "prefill_limit": [1.6, 1.8], "method": "keep09"}
    )
    frame = frame.assign(prefill_speedup_q1=[1.4, 1.6], prefill_speedup_q3=[1.6, 1.8])
    plots.speedup_over_length(frame, ax)
    measured, limit = ax.lines[0], ax.lines[1]
    assert list(measured.get_ydata()) == [1.5, 1.7] and list(limit.get_ydata()) == [1.6, 1.8]
    assert to_hex(measured.get_color()) == to_hex(limit.get_color()) and limit.get_linestyle() == "--"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1,024", "4,096"]
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1.4, 1.8)


def test_a_speedup_without_a_limit_is_drawn_alone(ax):
    frame = pd.DataFrame({"prompt_tokens": [512], "decode_speedup": [1.2], "method": "keep09"})
    plots.speedup_over_length(frame, ax, y="decode_speedup")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["keep09"]
    assert ax.get_ylabel() == "decode speed-up [times]"


def test_a_bar_is_the_median_of_its_method_and_says_so(ax):
    frame = pd.DataFrame({"method": ["unpruned"] * 3 + ["keep09"], "prefill_ms": [4.0, 5.0, 9.0, 3.5]})
    plots.time_bars(frame, ax)
    assert [bar.get_width() for bar in ax.patches] == [5.0, 3.5]
    assert [text.get_text() for text in ax.texts] == ["5", "3.5"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["unpruned", "keep09"]


def test_numbers_on_bars_have_no_exponent():
    assert [plots.short(value) for value in (10780.4, 236.2, 3.5, 0.0421, 0)] == ["10,780", "236", "3.5", "0.0421", "0"]


def test_memory_is_shown_in_the_unit_that_suits_it(ax):
    frame = pd.DataFrame({"prompt_tokens": [1024, 2048], "kv_bytes": [24e6, 47e6], "method": "keep09"})
    plots.memory_over_length(frame, ax)
    assert np.allclose(ax.lines[0].get_ydata(), [24, 47])
    assert ax.get_ylabel() == "KV cache [MB]"


def test_peak_memory_is_solid_and_the_cache_in_it_dashed(ax):
    frame = pd.DataFrame({"prompt_tokens": [1024], "kv_bytes": [1e9], "peak_memory_mb": [4000.0], "method": "keep09"})
    plots.memory_over_length(frame, ax)
    assert [(list(line.get_ydata()), line.get_linestyle()) for line in ax.lines[:2]] == [([4.0], "-"), ([1.0], "--")]
    assert ax.get_ylabel() == "peak memory [GB]"


def test_quality_over_flops_uses_a_log_axis_for_kl_and_percent_for_flops(ax):
    frame = pd.DataFrame({"prefill_flops_share": [0.6, 0.3], "kl_nats": [0.01, 0.2], "scorer": "learned"})
    plots.quality_over_flops(frame, ax)
    assert ax.get_yscale() == "log"
    assert np.allclose(ax.lines[0].get_xdata(), [0.3, 0.6]) and np.allclose(ax.lines[0].get_ydata(), [0.2, 0.01])
    assert ax.xaxis.get_major_formatter()(0.5) == "50%"


def test_the_pareto_front_leaves_out_beaten_points_and_keeps_ties():
    assert plots.pareto_front([1, 2, 2, 3], [5, 5, 6, 1]) == [2, 3]
    assert plots.pareto_front([1, 1], [2, 2]) == [0, 1]
    assert plots.pareto_front([1, 2], [5, 5], x_is_cost=True) == [0]


def test_a_kl_axis_has_plain_numbers_and_no_powers_of_ten(ax):
    frame = pd.DataFrame({"method": ["a", "b"], "prefill_ms": [1.0, 2.0], "kl_nats": [0.3, 0.02]})
    plots.pareto(frame, ax, x="prefill_ms")
    ax.figure.canvas.draw()
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert {"0.02", "0.05", "0.1", "0.2"} <= set(shown) and not any("mathdefault" in text for text in shown)


def test_pareto_draws_all_points_and_joins_the_best(ax):
    frame = pd.DataFrame(
        {"prefill_speedup": [1.0, 2.0, 1.5], "kl_nats": [0.01, 0.03, 0.5], "method": ["full", "a", "b"]}
    )
    plots.pareto(frame, ax)
    assert [line.get_label() for line in ax.lines] == ["full", "a", "b", "best of all"]
    assert list(ax.lines[-1].get_xdata()) == [1.0, 2.0]
    assert "(lower is better)" in ax.get_ylabel() and ax.get_yscale() == "log"


def test_points_of_one_family_are_joined(ax):
    frame = pd.DataFrame(
        {"prefill_ms": [3.0, 1.0], "kl_nats": [0.1, 0.2], "method": ["keep09", "keep07"], "family": "SDTP"}
    )
    plots.pareto(frame, ax, x="prefill_ms")
    assert ax.lines[0].get_label() == "SDTP" and list(ax.lines[0].get_xdata()) == [1.0, 3.0]
    assert ax.lines[0].get_linestyle() == "-" and "(lower is better)" in ax.get_xlabel()


def test_bars_of_a_group_are_the_means_of_its_rows(ax):
    frame = pd.DataFrame(
        {"group": ["qa", "qa", "code"], "score": [1.0, 3.0, 5.0], "scorer": ["learned", "learned", "learned"]}
    )
    plots.score_by_group(frame, ax)
    assert [bar.get_height() for bar in ax.patches] == [2.0, 5.0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["qa", "code"]


def test_a_falling_line_of_the_slope_chart_has_the_warning_colour(ax):
    frame = pd.DataFrame({"item": ["needle", "summary"], "before": [1.0, 2.0], "after": [0.5, 2.5]})
    plots.slope_chart(frame, ax)
    drawn = {tuple(line.get_ydata()): line.get_color() for line in ax.lines}
    assert drawn == {(1.0, 0.5): plots.PALETTE["vermillion"], (2.0, 2.5): plots.PALETTE["blue"]}


def test_a_frame_without_a_needed_column_is_refused_by_name(ax):
    with pytest.raises(ValueError, match=r"\['prefill_speedup'\].*prompt_tokens"):
        plots.speedup_over_length(pd.DataFrame({"prompt_tokens": [1]}), ax)


def test_the_overlap_counts_the_first_scorers_tokens_that_another_keeps_too(ax):
    first = TokenFates(np.array([3, 1, 2, 3]), (1, 2), 3, np.zeros((2, 4)))
    other = TokenFates(np.array([3, 3, 1, 2]), (1, 2), 3, np.zeros((2, 4)))
    plots.kept_overlap({"learned": first, "recency": other}, ax=ax)
    assert np.allclose(ax.lines[0].get_ydata(), [100 * 2 / 3, 50.0])


def test_the_kept_share_is_drawn_along_the_prompt(ax):
    fates = TokenFates(np.array([3, 1, 1, 3]), (1,), 3, np.zeros((1, 4)))
    plots.kept_share_by_position({"learned": fates}, ax=ax, bins=2)
    assert np.allclose(ax.lines[0].get_xdata(), [25, 75]) and np.allclose(ax.lines[0].get_ydata(), [50, 50])


def test_the_text_picture_wraps_its_tokens_and_colours_the_dropped_ones(ax):
    fates = TokenFates(np.array([3, 1, 3]), (1,), 3, np.zeros((1, 3)))
    plots.dropped_text(["abcd", "ef$g", "\nx"], fates, ax=ax, columns=6)
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [
        ("abcd", (0, 0.5)),
        (r"ef\$g", (0, 1.5)),
        ("x", (0, 2.5)),
    ]
    dropped, kept = ax.patches[1].get_facecolor(), ax.patches[0].get_facecolor()
    assert [box.get_xy()[1] for box in ax.patches] == [0.06, 1.06, 2.06] and dropped != kept
    assert kept == ax.patches[2].get_facecolor(), "kept tokens have one look"


def test_a_text_that_is_too_long_says_how_much_is_left_out(ax):
    fates = TokenFates(np.full(40, 3), (1,), 3, np.zeros((1, 40)))
    plots.dropped_text(["word "] * 40, fates, ax=ax, columns=10, max_lines=3)
    assert [text.get_text() for text in ax.texts].index("… 34 tokens left out …") == 4, "its end is shown too"


def test_the_question_and_the_answers_place_are_framed_whatever_is_left_out(ax):
    """The old picture stopped after its first lines: "... 138 more tokens" hid what was asked and where it stood."""
    tokens = [f"t{i:02d} " for i in range(40)]
    places = {"answer": (17, 18), "question": (36, 37)}
    fates = TokenFates(np.full(40, 3), (1,), 3, np.zeros((1, 40)))
    plots.dropped_text(tokens, fates, ax=ax, places=places, columns=8, max_lines=6)
    shown = {text.get_text() for text in ax.texts}
    assert {tokens[i] for i in (0, 17, 18, 36, 37, 39)} | {"answer", "question"} <= shown
    frames = [box for box in ax.patches if not box.get_fill()]
    assert [(box.get_x(), box.get_width()) for box in frames] == [(4, 4), (0, 4), (0, 8)]


def test_loss_curves_refuse_a_wanted_term_that_the_log_does_not_hold(ax):
    """Notebook 02 looked for ``mse``, the log says ``mse_loss``: three curves were missing and nothing failed."""
    frame = pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0], "mse_loss": [1.0, 0.5], "rank_loss": [np.nan, np.nan]})
    plots.loss_curves(frame, ax, terms=["loss", "mse_loss"])
    assert [line.get_label() for line in ax.lines] == ["loss", "mse_loss"]
    with pytest.raises(ValueError, match=r"loss_curves needs column\(s\) \['mse'\]: the frame has"):
        plots.loss_curves(frame, ax, terms=["loss", "mse"])
    with pytest.raises(ValueError, match="no values of rank_loss"):
        plots.loss_curves(frame, ax, terms=["loss", "rank_loss"])


def test_no_legend_lies_on_what_is_drawn_and_a_ratios_axis_starts_at_one(ax):
    frame = pd.DataFrame({"prompt_tokens": [1024, 4096], "prefill_speedup": [1.5, 1.7], "method": "keep09"})
    plots.speedup_over_length(frame, ax)
    ax.figure.canvas.draw()
    assert ax.get_ylim()[0] == 1
    assert not ax.get_legend().get_window_extent().overlaps(ax.patch.get_window_extent())


def test_one_legend_names_each_series_once_for_all_axes():
    figure, axes = plt.subplots(1, 2, layout="constrained")
    for ax, names in zip(axes, (("a", "b"), ("b", "c")), strict=True):
        for name in names:
            ax.plot([0, 1], [0, 1], label=name)
        ax.legend()
    plots.one_legend(axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert not [ax for ax in axes if ax.get_legend()]


def test_on_a_log_axis_scores_are_points_and_not_bars(ax):
    plots.score_by_group(pd.DataFrame({"group": ["qa", "code"], "score": [0.1, 2.0], "scorer": "SDTP"}), ax, log=True)
    assert not ax.patches and list(ax.lines[0].get_ydata()) == [0.1, 2.0]


def test_items_that_fall_together_are_one_line_with_all_their_names(ax):
    """Names at equal values were pushed above the axes, where nothing is drawn: three of five tasks were missing."""
    frame = pd.DataFrame({"item": ["a", "b", "c"], "before": [100.0, 100.0, 50.0], "after": [100.0, 100.0, 100.0]})
    plots.slope_chart(frame, ax)
    assert [text.get_text() for text in ax.texts[:2]] == ["100  c", "100  a, b"]
    assert all(text.get_position()[1] < ax.get_ylim()[1] for text in ax.texts)
