"""The model card of trained pruners: what they are for, how they were made, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.training import verdict
from sdtp_lib.training.recipes import Recipe


def write_card(
    path: Path,
    model_name: str,
    recipe_name: str,
    recipe: Recipe,
    layers: Sequence[int],
    data: Sequence[str],
    prompts: int,
    lines: Sequence[verdict.Line],
    provenance: Mapping[str, Any],
    begun: str = "",
) -> None:
    """Write the card as Markdown; ``data`` are sentences on where the prompts come from, ``begun`` is one on what the
    training went on from."""
    epochs = f"{recipe.training.epochs:g} epochs"
    if recipe.refinement is not None:
        epochs += f", then {recipe.refinement.epochs:g} through simulated pruning"
    words = " Long words are scored as one (`sdtp_lib/scorers/words.py`)." if recipe.blends else ""
    measured = "Nothing was measured."
    if lines:
        measured = (
            f"**{verdict.in_words(lines)}**\n\nKL to the unpruned model's next-token distributions on held-out "
            "prompts, nats per token, lower is better. The best training-free score is chosen on these very prompts; "
            f"the difference is learned minus best, with a paired bootstrap interval.\n\n{verdict.as_text(lines, True)}"
        )
    path.write_text(
        f"""---
library_name: sdtp
base_model: {model_name}
---
# Token pruners for {model_name}

One small network before each of the layers {", ".join(map(str, layers))} that scores the prompt's tokens, for `sdtp_lib.token_pruning`.
They were made for the weights with fingerprint `{provenance["weights_fingerprint"]}` ({provenance["weights"]}).

## What they are worth

{measured}

## How they were made

Recipe `{recipe_name}`: labels {" + ".join(recipe.labels)}, {prompts} prompts, {epochs}; settings, versions,
seed and the prompts' ids in `training.json`.{words} {begun}Data: {"; ".join(data)}. Prompts of Dolly (CC BY-SA 3.0) may be among them.

torch {provenance["torch"]}, transformers {provenance["transformers"]}, {provenance["device"]}, {provenance["dtype"]}; {provenance["utc"]}.
""",  # noqa: E501 - Markdown
        encoding="utf-8",
    )
