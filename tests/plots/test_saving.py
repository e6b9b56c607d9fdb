"""A figure on disk: picture and record, whole or not at all, with legend and the line about the model in place."""

from __future__ import annotations

import json

import matplotlib
import matplotlib.pyplot as plt
import pytest

from sdtp_lib import plots


def test_saving_writes_the_picture_and_what_made_it(tmp_path):
    fig = plt.subplots()[0]
    path = plots.save(fig, tmp_path / "deep" / "one.png", {"commit": "abc", "seed": 3}, svg=True)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".svg").read_text().rstrip().endswith("</svg>")
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "pictures": ["one.png", "one.svg"],
        "commit": "abc",
        "seed": 3,
    }
    assert sorted(file.name for file in path.parent.iterdir()) == ["one.json", "one.png", "one.svg"]


def test_saving_leaves_a_figure_without_layout_engine_without_one_whatever_the_style(tmp_path):
    # The old bug: between PNG and SVG the figure took the engine of a style set for the whole session, and warned.
    with matplotlib.rc_context():
        plots.use_style()
        fig = plt.Figure(layout="none")
        fig.add_axes((0.1, 0.1, 0.8, 0.8))
        plots.save(fig, tmp_path / "placed.png", svg=True)
        assert fig.get_layout_engine() is None


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = plots.save(plt.subplots()[0], tmp_path / "one.png", {})
    before = path.read_bytes()
    broken = plt.subplots()[0]

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(broken, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.save(broken, path, {})
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.json", "one.png"]


def test_a_legend_under_the_figure_lies_neither_on_the_axes_nor_on_the_line_that_names_the_model(tmp_path):
    figure, axes = plt.subplots(1, 2, layout="constrained")
    for ax in axes:
        ax.set_xlabel("x")
        for number in range(9):
            ax.plot([0, 1], [0, number], label=f"method number {number}")
    plots.one_legend(axes)
    drawn = {}

    def while_drawn(event):
        parts = {"legend": figure.legends[0], "axis": axes[0].xaxis.label, **{t.get_gid(): t for t in figure.texts}}
        drawn.update({name: part.get_window_extent(event.renderer) for name, part in parts.items()})

    figure.canvas.mpl_connect("draw_event", while_drawn)
    plots.save(figure, tmp_path / "two-rows.png", {"model": "embedded", "device": "cpu"})
    assert drawn["origin"].y1 < drawn["legend"].y0 < drawn["legend"].y1 < drawn["axis"].y0


def test_a_saved_picture_names_model_and_device_once(tmp_path):
    figure = plt.subplots()[0]
    for _ in range(2):
        made = {"model": "embedded", "weights": "Q4_1", "device": "cpu", "host_cpus": 2}
        plots.save(figure, tmp_path / "one.png", made)
    assert [text.get_text() for text in figure.texts] == ["SmolLM2-135M-Instruct (Q4_1) · CPU, 2 cores"]
