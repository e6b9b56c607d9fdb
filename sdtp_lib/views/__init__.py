"""Prompts as HTML strings, for notebooks, the explorer and reports; nothing is displayed or saved here.

`tokens` is the text, each token coloured, alone or two side by side; `layer_map` is the layer x token map,
`places` finds a text in the tokens.
"""

from __future__ import annotations

from sdtp_lib.views.layer_map import layer_token_map_html, layer_token_map_svg
from sdtp_lib.views.places import places_of
from sdtp_lib.views.tokens import (
    answers_html,
    display_tokens,
    dropped_tokens_html,
    scorers_html,
    stage_css,
    stage_key,
    token_info,
    token_text,
    tokens_html,
)

__all__ = [
    "answers_html",
    "display_tokens",
    "dropped_tokens_html",
    "layer_token_map_html",
    "layer_token_map_svg",
    "places_of",
    "scorers_html",
    "stage_css",
    "stage_key",
    "token_info",
    "token_text",
    "tokens_html",
]
