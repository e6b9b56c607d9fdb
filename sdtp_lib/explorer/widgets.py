"""The explorer: sliders and choosers (ipywidgets) around an `ExplorerState`.

A thin layer: every choice is handed to the state, every picture is a string from `views` or `live_html`. Moving
the keep ratio makes no model call and sends only a style sheet and a map; the button runs the engine. Works at the
keyboard (Tab, arrows, Enter); colours lie under the page's own text colour, so light and dark both work.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdtp_lib import views
from sdtp_lib.config import POSITION_MODES, PRESETS, PruningConfig
from sdtp_lib.explorer import live_html
from sdtp_lib.explorer.export import export_state
from sdtp_lib.explorer.state import OWN, ExplorerState, Source, parse_layers
from sdtp_lib.extras import extra
from sdtp_lib.pruning.token_fates import TokenFates, simulate
from sdtp_lib.views.layer_map import layer_token_map_svg
from sdtp_lib.views.tokens import answers_html

with extra("study"):
    import ipywidgets

_COUNTER = itertools.count()
_WIDE = {"style": {"description_width": "96px"}, "layout": ipywidgets.Layout(width="98%", max_width="480px")}
_NO_SCORER = "(nobody)"


def explore(source: Source | ExplorerState, *, export_to: str | Path | None = None, **choices: Any) -> ipywidgets.VBox:
    """The explorer as one widget.

    Parameters
    ----------
    source
        A `Source` (then ``choices`` go to `ExplorerState`) or a state to go on with.
    export_to
        Folder that the button "save view" writes to; without it there is no button.
    """
    state = source if isinstance(source, ExplorerState) else ExplorerState(source, **choices)
    return Explorer(state, export_to=export_to).box


class Explorer:
    """Widgets by name (``.keep_ratio``, ``.layers``, ``.run`` ...) around ``.state``; ``.box`` is what to display."""

    def __init__(self, state: ExplorerState, *, export_to: str | Path | None = None) -> None:
        self.state = state
        self.export_to = Path(export_to) if export_to else None
        self._prefix = f"x{next(_COUNTER)}t"
        self._syncing = False
        source = state.source
        self.prompt = ipywidgets.Dropdown(description="prompt", options=list(source.prompts), **_WIDE)
        self.scorer = ipywidgets.Dropdown(description="scorer", options=list(source.scorers), **_WIDE)
        self.preset = ipywidgets.Dropdown(description="preset", options=[*PRESETS, OWN], **_WIDE)
        self.positions = ipywidgets.Dropdown(description="positions", options=POSITION_MODES, **_WIDE)
        self.layers = ipywidgets.Text(description="prune before", continuous_update=False, **_WIDE)
        self.layers.tooltip = "stage layers, such as 4, 7, 10 or 4-25:3; Enter to apply"
        self.keep_ratio = ipywidgets.FloatSlider(
            description="keep ratio", min=0.3, max=1.0, step=0.01, readout_format=".2f", **_WIDE
        )
        self.seen_by = ipywidgets.IntSlider(
            description="seen by layer", min=0, max=source.num_layers - 1, value=source.num_layers - 1, **_WIDE
        )
        self.zoom = ipywidgets.IntRangeSlider(description="zoom tokens", min=0, max=1, **_WIDE)
        self.against = ipywidgets.Dropdown(description="compare with", options=[_NO_SCORER, *source.scorers], **_WIDE)
        self.token = ipywidgets.BoundedIntText(description="token", min=0, max=0, **_WIDE)
        self.run = ipywidgets.Button(description="run the engine", button_style="primary", icon="play")
        self.save = ipywidgets.Button(description="save view", icon="save")
        self.message = ipywidgets.HTML()
        self.text = ipywidgets.HTML()
        self.picture = ipywidgets.HTML()
        self.inspected = ipywidgets.HTML()
        self.result = ipywidgets.HTML()
        self._sync()
        self._new_text()
        self.draw()
        for name in ("prompt", "scorer", "preset", "positions", "keep_ratio"):
            getattr(self, name).observe(self._chooser(name), "value")
        self.layers.observe(self._chooser("layers", parse_layers), "value")
        for widget in (self.seen_by, self.zoom, self.against):
            widget.observe(lambda _: self.draw(), "value")
        self.token.observe(lambda _: self._inspect(), "value")
        self.run.on_click(lambda _: self._run())
        self.save.on_click(lambda _: self._save())
        self.box = self._layout()

    def draw(self) -> None:
        """Send what changes with a choice: colours, legend, map and numbers."""
        state, fates = self.state, self.state.fates
        names = (state.scorer, self.against.value)
        if names[1] == _NO_SCORER:
            style = live_html.style_html(fates, self._prefix, at_layer=self.seen_by.value)
            key = views.stage_css(fates) + views.stage_key(fates)
        else:
            other = state.fates_of(names[1])
            style = live_html.compare_style_html(fates, other, self._prefix, names)
            key = live_html.compare_key(fates, other, names)
        window = (self.zoom.value[0], self.zoom.value[1] + 1)
        svg = layer_token_map_svg(fates, state.scored.tokens, window=window, height=200)
        self.picture.value = (
            f'{style}<div class="sdtp"><div class="key">{key}</div>{_numbers(state)}{svg}'
            "<div class=info>zoom with the slider “zoom tokens”; up to 200 tokens columns name their token</div></div>"
        )
        self._inspect()

    def _chooser(self, name: str, read: Callable[[Any], Any] = lambda value: value) -> Callable[[Any], None]:
        def chosen(change: Any) -> None:
            if self._syncing:
                return
            try:
                self.state.update(**{name: read(change["new"])})
                self.message.value = ""
            except ValueError as error:
                self.message.value = f'<div role="alert" class="sdtp">⚠ {html.escape(str(error))}</div>'
            self._sync()
            self.result.value = ""
            if name != "keep_ratio":
                self._new_text()
            self.draw()

        return chosen

    def _sync(self) -> None:
        """Make the widgets say what the state says, without answering their own echo."""
        state, self._syncing = self.state, True
        ratio = state.config.keep_ratio
        self.prompt.value, self.scorer.value, self.preset.value = state.prompt, state.scorer, state.preset
        self.positions.value = state.config.positions
        self.keep_ratio.value = ratio if isinstance(ratio, float) else float(np.mean(ratio))
        self.layers.value = ", ".join(map(str, state.config.layers))
        self._syncing = False

    def _new_text(self) -> None:
        """Send the whole text: only when it is another one."""
        scored = self.state.scored
        stages = tuple(layer for layer in sorted(scored.scores) if layer in self.state.config.layers)
        whole = simulate(scored.scores, PruningConfig(layers=stages, keep_ratio=1.0), self.state.source.num_layers)
        self.text.value = live_html.text_html(scored.tokens, whole, self._prefix)
        last = len(scored.tokens) - 1
        self.zoom.max, self.zoom.value, self.token.max = last, (0, last), last

    def _inspect(self) -> None:
        self.inspected.value = _token_line(self.state.scored.tokens, self.state.fates, self.token.value)

    def _run(self) -> None:
        self.run.disabled, self.run.description = True, "running …"
        try:
            outcome = self.state.run()
            self.result.value = _savings(outcome) + answers_html(outcome.full_answer, outcome.answer)
        except (ValueError, RuntimeError) as error:
            self.message.value = f'<div role="alert" class="sdtp">⚠ {html.escape(str(error))}</div>'
        finally:
            self.run.disabled, self.run.description = False, "run the engine"
        self.draw()

    def _save(self) -> None:
        files = export_state(self.state, self.export_to)
        names = html.escape(", ".join(path.name for path in files))
        self.message.value = (
            f'<div role="status" class="sdtp">saved {names} in {html.escape(str(self.export_to))}</div>'
        )

    def _layout(self) -> ipywidgets.VBox:
        wrap = ipywidgets.Layout(display="flex", flex_flow="row wrap", width="100%")
        left = [self.prompt, self.scorer, self.preset, self.positions]
        right = [self.keep_ratio, self.layers, self.seen_by, self.zoom]
        half = ipywidgets.Layout(flex="1 1 320px", max_width="520px")
        choices = [ipywidgets.VBox(column, layout=half) for column in (left, right)]
        buttons = [self.run, *([self.save] if self.export_to else [])]
        below = [ipywidgets.VBox([self.against], layout=half), ipywidgets.VBox([self.token], layout=half)]
        rows = [
            ipywidgets.Box(choices, layout=wrap),
            ipywidgets.Box(below, layout=wrap),
            ipywidgets.HBox(buttons),
            *(self.message, self.picture, self.inspected, self.text, self.result),
        ]
        return ipywidgets.VBox(rows, layout=ipywidgets.Layout(max_width="1100px"))


def _numbers(state: ExplorerState) -> str:
    numbers = state.numbers()
    flops = numbers.get("prefill_flops_share")
    parts = [
        "approximate, from the scores of one unpruned run" if state.fates.approximate else "what the engine did",
        f"{numbers['kept_tokens']:,} of {numbers['prompt_tokens']:,} tokens reach the last layer",
        f"1/τ {numbers['compression_ratio']:.2f}",
        f"KV cache {100 * numbers['kv_share']:.0f} %",
        *([f"prefill FLOPs {100 * flops:.0f} %"] if flops is not None else []),
    ]
    return f'<div class="head" aria-live="polite">{" · ".join(parts)}</div>'


def _token_line(tokens: Any, fates: TokenFates, position: int) -> str:
    info = views.token_info(TokenFates(*_one(fates, position)), [position])[0]
    text = html.escape(tokens[position].replace("\n", "↵"))
    return f'<div class="sdtp"><code>{text}</code> · {info} · {fates.layer_label(position)}</div>'


def _one(fates: TokenFates, position: int) -> tuple[Any, ...]:
    only = slice(position, position + 1)
    return fates.dropped_at[only], fates.layers, fates.num_layers, fates.scores[:, only]


def _savings(outcome: Any) -> str:
    rows = (
        ("prefill", outcome.full_prefill_s, outcome.prefill_s, "s", 1),
        ("prefill and answer", outcome.full_total_s, outcome.total_s, "s", 1),
        ("KV cache", outcome.full_kv_bytes / 1e6, outcome.kv_bytes / 1e6, "MB", 1),
    )
    cells = "".join(
        f"<tr><td>{name}</td><td>{full:.2f} {unit}</td><td>{pruned:.2f} {unit}</td>"
        f"<td>{100 * (1 - pruned / full) if full else 0:.0f} % saved</td></tr>"
        for name, full, pruned, unit, _ in rows
    )
    return (
        '<div class="sdtp"><table><tr><th></th><th>unpruned</th><th>pruned</th><th>one run each, not a benchmark</th>'
        f"</tr>{cells}</table></div>"
    )
