"""The explorer: sliders and choosers (ipywidgets) around an `ExplorerState`.

A thin layer: every choice is handed to the state, every picture is a string from `views` or `live_html`. Moving
the keep ratio makes no model call and sends only a style sheet and a map; the button runs the engine. A choice that
cannot be is answered in one sentence and goes back. Works at the keyboard (Tab, arrows, Enter), light and dark.
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
from sdtp_lib.explorer.controls import WIDE, ModelBox, OwnPrompt, Progress, explained
from sdtp_lib.explorer.export import export_state
from sdtp_lib.explorer.state import OWN, ExplorerState, Source
from sdtp_lib.explorer.typed import parse_layers, parse_protected, said_spans
from sdtp_lib.extras import extra
from sdtp_lib.pruning.token_fates import simulate
from sdtp_lib.views.layer_map import layer_token_map_svg
from sdtp_lib.views.tokens import answers_html

with extra("study"):
    import ipywidgets
    from ipywidgets import Layout

_COUNTER = itertools.count()
_NOTHING = "nothing"
_EVERY_CUT = ("every cut", 0)  # 0: no cut is before layer 0
MY_PROMPT = "my prompt"


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
        self.export_to = Path(export_to) if export_to else None
        self._prefix = f"x{next(_COUNTER)}t"
        self._syncing = False
        self.prompt = ipywidgets.Dropdown(description="prompt", **WIDE)
        self.scorer = ipywidgets.Dropdown(description="tokens scored by", **WIDE)
        self.preset = ipywidgets.Dropdown(description="setting", options=[*PRESETS, OWN], **WIDE)
        self.keep_ratio = ipywidgets.FloatSlider(
            description="kept at each cut", min=0.3, max=1.0, step=0.01, readout_format=".0%", **WIDE
        )
        self.view = ipywidgets.SelectionSlider(description="show", options=[_EVERY_CUT], **WIDE)
        self.against = ipywidgets.Dropdown(description="compare with", options=[_NOTHING], **WIDE)
        self.layers = ipywidgets.Text(description="cut before layers", continuous_update=False, **WIDE)
        self.positions = ipywidgets.Dropdown(description="positions", options=POSITION_MODES, **WIDE)
        self.zoom = ipywidgets.IntRangeSlider(description="zoom the map", min=0, max=1, **WIDE)
        self.token = ipywidgets.BoundedIntText(description="token number", min=0, max=0, **WIDE)
        self.protect = ipywidgets.Text(
            description="protect", placeholder="select text below", continuous_update=False, **WIDE
        )
        self.protect.add_class(f"{self._prefix}protect")
        self.run = ipywidgets.Button(description="run the engine", button_style="primary")
        self.save = ipywidgets.Button(description="save view")
        self.message = ipywidgets.HTML()
        self.text, self.picture, self.inspected, self.result = (ipywidgets.HTML() for _ in range(4))
        self.progress = Progress(self.text, self.picture, self.result)
        self.own = OwnPrompt(self._score_mine)
        self.model = ModelBox(state.source.name, self._load)
        self._take(state)
        for name in ("prompt", "scorer", "preset", "positions", "keep_ratio"):
            getattr(self, name).observe(self._chooser(name), "value")
        self.layers.observe(self._chooser("layers", parse_layers), "value")
        self.protect.observe(self._chooser("protect", self._protected), "value")
        for widget in (self.view, self.zoom, self.against):
            widget.observe(lambda _: self._syncing or self._try(self.draw), "value")
        self.token.observe(lambda _: self._syncing or self._inspect(), "value")
        self.run.on_click(lambda _: self._run())
        self.save.on_click(lambda _: self._save())
        self.box = self._layout()

    def _take(self, state: ExplorerState) -> None:
        """Show ``state``, which may be on another model than the one before."""
        self.state, source = state, state.source
        if hasattr(source, "on_progress"):
            source.on_progress = self.progress.tell
        self._syncing = True
        self.scorer.options = list(source.scorers)
        self.against.options = [_NOTHING, *source.scorers]
        self.model.note.value = "<br>".join(html.escape(note) for note in source.notes)
        self._syncing = False
        self._sync()
        self._new_text()
        self.draw()

    def draw(self) -> None:
        """Send what changes with a choice: colours, legend, map and numbers."""
        state, fates = self.state, self.state.fates
        names = (state.scorer, self.against.value)
        if names[1] == _NOTHING:
            style = live_html.style_html(fates, self._prefix, at_layer=self.view.value or None, protected=state.protect)
            key = views.stage_css(fates) + views.stage_key(fates)
        else:
            other = state.fates_of(names[1])
            style = live_html.compare_style_html(fates, other, self._prefix, names)
            key = live_html.compare_key(fates, other, names)
        window = (self.zoom.value[0], self.zoom.value[1] + 1)
        svg = layer_token_map_svg(fates, state.scored.tokens, window=window, height=190)
        self.picture.value = (
            f'{style}<div class="sdtp">{live_html.numbers_html(state)}{svg}<div class="key">{key}</div></div>'
        )
        self._inspect()

    def _try(self, action: Callable[[], None], *, computing: bool = True) -> bool:
        """Do it, greyed with a bar while it computes; what goes wrong becomes one sentence. Whether it went well."""
        self.message.value = ""
        try:
            if not computing:
                action()
            else:
                with self.progress:
                    action()
        # Anything: a widget's callback would swallow it, and the page would show a choice that did not come true.
        except Exception as error:
            words = str(error) if isinstance(error, (ValueError, RuntimeError, OSError)) else repr(error)
            self.message.value = f'<div role="alert" class="sdtp">⚠ {html.escape(words)}</div>'
            return False
        return True

    def _chooser(self, name: str, read: Callable[[Any], Any] = lambda value: value) -> Callable[[Any], None]:
        def chosen(change: Any) -> None:
            if self._syncing:
                return

            def change_state() -> None:
                self.state.update(**{name: read(change["new"])})
                self.result.value = ""
                if name in ("prompt", "scorer", "layers", "preset"):
                    self._new_text()
                self.draw()

            # A moved slider asks no model: greying its own picture would only flicker.
            self._try(change_state, computing=name in ("prompt", "scorer"))
            self._sync()

        return chosen

    def _sync(self) -> None:
        """Make the widgets say what the state says, without answering their own echo."""
        state, self._syncing = self.state, True
        ratio = state.config.keep_ratio
        self.prompt.options = list(state.source.prompts)
        self.prompt.value, self.scorer.value, self.preset.value = state.prompt, state.scorer, state.preset
        self.positions.value = state.config.positions
        self.keep_ratio.value = ratio if isinstance(ratio, float) else float(np.mean(ratio))
        self.layers.value = ", ".join(map(str, state.config.layers))
        self.protect.value = said_spans(state.protect)
        views_of = (_EVERY_CUT, *((f"what layer {n} reads", n) for n in state.config.layers))
        if self.view.options != views_of:
            seen = self.view.value
            self.view.options = views_of
            self.view.value = seen if seen in state.config.layers else 0
        self._syncing = False

    def _new_text(self) -> None:
        """Send the whole text: only when it is another one."""
        scored = self.state.scored
        stages = tuple(layer for layer in sorted(scored.scores) if layer in self.state.config.layers)
        whole = simulate(scored.scores, PruningConfig(layers=stages, keep_ratio=1.0), self.state.source.num_layers)
        text = live_html.text_html(scored.tokens, whole, self._prefix)
        if text == self.text.value:
            return
        self.text.value, last = text, len(scored.tokens) - 1
        self._syncing = True
        self.zoom.max, self.zoom.value, self.token.max = last, (0, last), last
        self._syncing = False

    def _inspect(self) -> None:
        self.inspected.value = live_html.token_html(self.state.scored.tokens, self.state.fates, self.token.value)

    def _protected(self, text: str) -> tuple[int, ...]:
        return parse_protected(text, self.state.scored.tokens)

    def _run(self) -> None:
        def prune() -> None:
            outcome = self.state.run()
            self.result.value = answers_html(outcome.full_answer, outcome.answer) + live_html.savings_html(outcome)

        self.run.disabled = True
        self._try(prune)
        self.run.disabled = False
        self.draw()

    def _score_mine(self, document: str, question: str, chat: bool) -> None:
        def score() -> None:
            self.state.source.add_prompt(MY_PROMPT, document, question, chat=chat)
            self.state.update(prompt=MY_PROMPT)
            self.result.value = ""
            self._new_text()
            self.draw()

        self.own.button.disabled = True
        self._try(score)
        self._sync()
        self.own.button.disabled = False

    def _load(self, name: str) -> None:
        def load() -> None:
            self.progress.tell(f"loading {name}", 0, 1)
            self._take(ExplorerState(self.state.source.with_model(name)))
            self.result.value = ""

        self.model.button.disabled = True
        if not self._try(load):
            self.model.name.value = self.state.source.name
        self.model.button.disabled = False

    def _save(self) -> None:
        def save() -> None:
            against = None if self.against.value == _NOTHING else self.against.value
            files = export_state(self.state, self.export_to, against=against)
            names = html.escape(", ".join(path.name for path in files))
            self.message.value = (
                f'<div role="status" class="sdtp">saved {names} in {html.escape(str(self.export_to))}</div>'
            )

        self._try(save, computing=False)

    def _layout(self) -> ipywidgets.VBox:
        half = Layout(flex="1 1 330px", max_width="540px", min_width="0")
        wrap = Layout(display="flex", flex_flow="row wrap", width="100%", grid_gap="0 16px")

        def grid(*controls: Any) -> ipywidgets.Box:
            columns = [[explained(control) for control in controls[start::2]] for start in (0, 1)]
            return ipywidgets.Box([ipywidgets.VBox(column, layout=half) for column in columns], layout=wrap)

        pages = {
            "choices": grid(self.prompt, self.scorer, self.keep_ratio, self.preset, self.view, self.against),
            "my prompt": self.own.box,
            "more choices": grid(self.protect, self.token, self.layers, self.zoom, self.positions),
            "model": self.model.box,
        }
        self.tabs = ipywidgets.Tab(children=list(pages.values()), titles=list(pages))
        buttons = [self.run, *([self.save] if self.export_to else []), self.progress.box]
        script = {"output_type": "display_data", "data": {"application/javascript": live_html.script()}, "metadata": {}}
        rows = [
            self.tabs,
            ipywidgets.HBox(buttons, layout=Layout(align_items="center", flex_flow="row wrap")),
            *(self.message, self.result, self.picture, self.text, self.inspected),
            ipywidgets.Output(outputs=(script,), layout=Layout(display="none")),
        ]
        return ipywidgets.VBox(rows, layout=Layout(max_width="1100px"))
