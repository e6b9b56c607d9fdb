"""The scorer that a model gets when nobody names one: pruners made for these very weights, else a training-free score.

Pruners are looked for in the package and in the user's folder (`shipped`), by the fingerprint of the weights. Knows
scorers and folders, not budgets.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.scorers.simple import NAMED
from sdtp_lib.scorers.token_pruners import TokenPruners, weights_fingerprint
from sdtp_lib.shipped import about, pruner_folders, pruners_folder

# Not the lowest mean: over all cells of docs/leaderboard.md streamingllm's is lower, by text and instructions. It drops
# what is far whatever is asked, and loses more of the answers far back at 1,024 tokens; specprefill loses fewer of
# those than either, and takes a second pass.
TRAINING_FREE = "attention_pooled"

_loaded: weakref.WeakKeyDictionary[Any, dict[tuple[str, float], TokenPruners]] = weakref.WeakKeyDictionary()


def training_free_layers(num_layers: int) -> tuple[int, ...]:
    """The stages of `TRAINING_FREE` where nothing else fixes them: every fifth layer from layer 4 on, earlier only in
    models of under twelve layers.

    30 layers: 4, 9, 14, 19, 24, 29. At equal FLOPs the least KL of the schedules that were tried
    (`benchmarks/schedules.py pairs`; LOG.md, "Which stages for the training-free default?").
    """
    return tuple(range(min(4, max(1, num_layers // 3)), num_layers, 5))


def scorer_called(name: str, model: Any) -> Scorer:
    """A training-free score by its name, or pruners from a folder, a shipped set's name, or a Hub id.

    Raises
    ------
    ValueError
        If there is neither a score nor a folder of that name.
    """
    if name in NAMED:
        return NAMED[name]()
    if pruners_folder(name) is None and name.count("/") != 1:
        raise ValueError(
            f"scorer={name!r} is unknown: give one of {', '.join(NAMED)}, a method's name, or a folder or Hub id of "
            "pruners."
        )
    return TokenPruners.from_pretrained(name).to(model.device).eval()


def default_scorer(model: Any, layers: Sequence[int] | None = None) -> tuple[Scorer, str]:
    """The scorer where nobody names one, and a sentence on why it is not trained pruners; empty where it is."""
    pruners, missing = pruners_for(model, layers)
    return (pruners, "") if pruners is not None else (scorer_called(TRAINING_FREE, model), missing)


def pruners_for(model: Any, layers: Sequence[int] | None = None) -> tuple[TokenPruners | None, str]:
    """Pruners made for ``model``'s very weights and for ``layers`` (None: any), and why there are none.

    Returns
    -------
    (TokenPruners or None, str)
        On the model's device; the sentence is empty where some were found.
    """
    fitting, elsewhere = _folders_for(model, layers)
    if fitting:
        return _load(model, fitting[0]), ""
    if elsewhere:
        return None, f"pruners of this model were made for other layers ({'; '.join(elsewhere)})"
    return None, "no pruners were made for this model's weights"


def every_pruners_for(model: Any, layers: Sequence[int] | None = None) -> list[tuple[str, TokenPruners]]:
    """Name and pruners of every set that was made for ``model``'s very weights and for ``layers`` (None: any)."""
    return [(folder.name, _load(model, folder)) for folder in _folders_for(model, layers)[0]]


def _folders_for(model: Any, layers: Sequence[int] | None) -> tuple[list[Path], list[str]]:
    """The folders of fitting pruners, best first, and a remark on each that fits the weights but not the layers."""
    text = model.config.get_text_config()
    own, fitting, elsewhere = None, [], []
    for folder in pruner_folders():
        known = about(folder)
        if (known.get("model_type"), known.get("hidden_size")) != (text.model_type, text.hidden_size):
            continue
        own = own or weights_fingerprint(model)
        if own is None or known.get("weights_fingerprint") != own:
            continue
        if layers is None or set(layers) <= set(known.get("layers", ())):
            fitting.append(folder)
        else:
            elsewhere.append(f"{folder.name} scores before layers {known.get('layers')}")
    return fitting, elsewhere


def _load(model: Any, folder: Path) -> TokenPruners:
    known = (str(folder), (folder / "config.json").stat().st_mtime)
    mine = _loaded.setdefault(model, {})
    if known not in mine:
        mine[known] = TokenPruners.from_pretrained(folder).eval()
    return mine[known].to(model.device)
