"""A tiny random language model inside a multimodal one, whose sizes stand in a configuration within its own."""

from __future__ import annotations

from typing import Any

import family_models
import pytest


def multimodal_model() -> Any:
    """A Gemma3ForConditionalGeneration in float32; skips where this transformers has none."""
    if "gemma3" not in family_models.families():
        pytest.skip("this transformers has no gemma3")
    model = family_models.tiny_model("gemma3", "sdpa").float()
    if model.config.get_text_config() is model.config:
        pytest.skip("this transformers builds gemma3's language model alone")
    return model
