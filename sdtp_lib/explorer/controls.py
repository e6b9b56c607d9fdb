"""Small parts of the explorer's panel: a control with its "?", the form for one's own prompt, the box for the model.

Widgets only; what is typed here is handed to the explorer, which asks its state.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable
from typing import Any

from sdtp_lib.extras import extra

with extra("study"):
    import ipywidgets
    from ipywidgets import Layout

_COUNTER = itertools.count()
WIDE = {"style": {"description_width": "112px"}, "layout": Layout(width="100%", flex="1 1 auto", min_width="0")}

HELP = {
    "prompt": "Which prompt is shown. “my prompt” makes one of your own.",
    "tokens scored by": "What decides which tokens stay: small trained networks (learned), the attention paid by the "
    "last tokens (attention), the place in the prompt (recency), the size of the hidden state (hidden_norm), or chance "
    "(random).",
    "setting": "A named choice of cuts and share. keep09 keeps 90 % at each of several cuts, so far less at the end: "
    "38 % of the tokens reach the last of 30 layers. “own” is what you chose yourself.",
    "kept at each cut": "Share of the tokens still read that stays at each cut. The first tokens and the last tenth "
    "always stay. Until you run the engine the picture is cut from the scores of one unpruned run: approximate, "
    "because in a real run later scores depend on earlier cuts.",
    "show": "Every cut at once, or what one layer still reads: dropped just before it in colour, dropped earlier "
    "struck through.",
    "compare with": "A second scorer with the same cuts: which tokens does only one of the two keep to the end?",
    "cut before layers": "The layers before which tokens are dropped, such as 4, 7, 10 or 4-25:3 (every third). Enter "
    "applies it.",
    "positions": "“original”: kept tokens keep the positions they had in the prompt. “compact”: they are numbered "
    "anew, without gaps, after each cut.",
    "zoom the map": "The tokens that it shows. At 200 or fewer, pointing at a column names its token.",
    "token number": "All that is known of one token, without a mouse.",
    "protect": "Text that is never dropped: select it in the prompt below, or type it, or type token numbers such as "
    "120-131. Empty the box to protect nothing.",
    "model": "“embedded”, a folder in the transformers format, or the id of a model on the Hugging Face Hub. Trained "
    "pruners that do not fit it are left out.",
}


def explained(control: Any, name: str | None = None) -> ipywidgets.HBox:
    """``control`` beside a "?" that says in plain words what it does (click, Enter, or pointing at it)."""
    label, identifier = name or control.description, f"sdtp-help-{next(_COUNTER)}"
    words = html.escape(HELP[label], quote=True)
    ask = ipywidgets.HTML(
        f'<button type="button" popovertarget="{identifier}" title="{words}" aria-label="what “{label}” means" '
        'style="width:20px;height:20px;padding:0;border-radius:50%;border:1px solid rgb(128 128 128/.6);'
        'background:none;color:inherit;cursor:pointer;font:12px/1 system-ui">?</button>'
        f'<div popover id="{identifier}" style="max-width:420px;padding:12px 16px;border:1px solid rgb(128 128 128/.6);'
        "border-radius:8px;font:14px/1.5 system-ui;color:var(--jp-ui-font-color1,CanvasText);"
        f'background:var(--jp-layout-color0,Canvas)">{words}</div>',
        layout=Layout(flex="0 0 24px"),
    )
    return ipywidgets.HBox([control, ask], layout=Layout(width="100%", align_items="center"))


class OwnPrompt:
    """Two fields, a file and the chat format; ``score_it(document, question, chat)`` when the button is pressed."""

    def __init__(self, score_it: Callable[[str, str, bool], None]) -> None:
        wide = {"style": WIDE["style"], "layout": Layout(width="98%")}
        self.document = ipywidgets.Textarea(
            description="document", placeholder="paste a text, or open a file", rows=6, **wide
        )
        self.question = ipywidgets.Text(description="question", placeholder="asked after the document", **wide)
        self.chat = ipywidgets.Checkbox(value=True, description="in the model's chat format", indent=False)
        self.file = ipywidgets.FileUpload(accept=".txt,.md,.text", description="open a text file", icon="")
        self.button = ipywidgets.Button(description="score it", button_style="primary")
        self.file.observe(lambda _: self._read(), "value")
        self.button.on_click(lambda _: score_it(self.document.value, self.question.value, self.chat.value))
        self.chat.layout.width = "220px"
        row = ipywidgets.HBox([self.button, self.file, self.chat], layout=Layout(flex_flow="row wrap"))
        self.box = ipywidgets.VBox([self.document, self.question, row])

    def _read(self) -> None:
        for one in self.file.value:
            self.document.value = bytes(one["content"]).decode("utf-8", errors="replace")


class ModelBox:
    """The model's name and a button; ``load(name)`` when it is pressed."""

    def __init__(self, name: str, load: Callable[[str], None]) -> None:
        self.name = ipywidgets.Text(value=name, description="model", **WIDE)
        self.button = ipywidgets.Button(description="load it", button_style="primary")
        self.note = ipywidgets.HTML()
        self.button.on_click(lambda _: load(self.name.value.strip()))
        self.box = ipywidgets.VBox([explained(self.name), self.button, self.note])


class Progress:
    """A bar with words above the picture while the model works; the picture before it goes grey (class ``stale``)."""

    CSS = "<style>.sdtp-stale{opacity:.38;filter:grayscale(1)}</style>"

    def __init__(self, *pictures: Any) -> None:
        self._pictures = pictures
        self.words = ipywidgets.HTML()
        self.bar = ipywidgets.IntProgress(min=0, max=1, layout=Layout(width="220px", visibility="hidden"))
        self.box = ipywidgets.HBox([self.bar, self.words], layout=Layout(min_height="28px", align_items="center"))

    def __enter__(self) -> Progress:
        for picture in self._pictures:
            picture.add_class("sdtp-stale")
        self.tell("computing", 0, 1)
        self.bar.layout.visibility = "visible"
        return self

    def tell(self, words: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of what ``words`` name."""
        self.bar.max, self.bar.value = max(total, 1), done
        self.words.value = f'<span role="status">{html.escape(words)} …</span>{self.CSS}'

    def __exit__(self, *_: object) -> None:
        for picture in self._pictures:
            picture.remove_class("sdtp-stale")
        self.bar.layout.visibility, self.words.value = "hidden", ""
