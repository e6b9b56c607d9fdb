"""The trainings of a recipe: new pruners or given ones, on labels first, then on what a cut does to the predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdtp_lib.config import PruningConfig
from sdtp_lib.processes import Share
from sdtp_lib.provenance import content_id
from sdtp_lib.scorers.blend import Blend
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.training import trainer
from sdtp_lib.training.recipes import Recipe

_SIZES = ("features", "width", "query_rank", "query_heads", "query_window", "attention_kernel", "passage_tokens")


def begun_from(start: str | Path, model: nn.Module, layers: Sequence[int], recipe: Recipe) -> TokenPruners:
    """Pruners to train further, without a blend: it is chosen anew.

    Raises
    ------
    ValueError
        If they are for other layers, for a model of other sizes, or have other inputs or sizes than the recipe's.
    """
    pruners = TokenPruners.from_pretrained(start)
    pruners = TokenPruners.from_pretrained(start, blend=None, notes={"start": pruners.identity})
    if pruners.layers != tuple(layers):
        raise ValueError(f"start={str(start)!r} has layers {list(pruners.layers)}; wanted are {list(layers)}.")
    pruners.check(model, PruningConfig(layers=tuple(layers)))
    wanted = TokenPruners.for_model(model, layers, **recipe.pruner_options(pruners.hidden_size))
    own, other = ({name: getattr(each, name) for name in _SIZES} for each in (pruners, wanted))
    own["features"], other["features"] = sorted(own["features"]), sorted(other["features"])
    if differing := [f"{name}={own[name]!r} and not {other[name]!r}" for name in _SIZES if own[name] != other[name]]:
        raise ValueError(f"start={str(start)!r} has other inputs or sizes than the recipe ({', '.join(differing)}): "
                         "give the recipe that it was made by.")  # fmt: skip
    pruners.word_table = None  # the blend is chosen without, as for new ones
    return pruners.to(model.device).train()


def averaged(first: Mapping[str, Tensor], last: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """State of pruners: ``share`` of ``first`` and the rest of ``last``; what is no weight is the last's."""
    return {
        name: share * first[name] + (1 - share) * own if own.is_floating_point() else own for name, own in last.items()
    }


def trained(
    model: nn.Module,
    labelled: Any,
    layers: Sequence[int],
    recipe: Recipe,
    work: Path,
    name: str,
    share: Share,
    progress: bool,
    seed: int,
    begun: TokenPruners | None,
) -> TokenPruners:
    """The pruners of the recipe, or ``begun`` trained further, from where a killed run stopped."""
    options = recipe.pruner_options(model.config.get_text_config().hidden_size)
    notes = {"recipe": content_id(recipe.to_dict()), "labels": list(recipe.labels), "smoothing": recipe.smoothing,
             "prompts": len(labelled), "seed": seed}  # fmt: skip
    made = {"base_model": name, "notes": notes, **options} if begun is None else {"pruners": begun}
    pruners = trainer.train_pruners(
        model, labelled, recipe.training, layers=layers, output_dir=work, progress=progress and share.is_first, **made
    )
    share.wait()
    if recipe.refinement is None:
        return pruners
    history = pruners.history
    pruners.blend = Blend(**recipe.blends[0]) if recipe.blends else None
    pruners = trainer.train_pruners(
        model, labelled, recipe.refinement, layers=layers, output_dir=work / "refined", pruners=pruners.train(),
        progress=progress and share.is_first,
    )  # fmt: skip
    pruners.history, pruners.blend = history + pruners.history, None
    if share.is_first:
        pruners.save_pretrained(work / "pruners")
    share.wait()
    return pruners
