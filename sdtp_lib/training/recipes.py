"""Recipes: all that decides how pruners come out, by name. ``"sdtp"`` is this project's, ``"paper"`` the paper's.

A recipe is which labels are summed, what a pruner sees, which losses teach it, and which blends of its score with
attention and recency are tried at the end. The prompts are `data.training_mix`'s and the user's; how a run goes, `run`
knows.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdtp_lib.config import PruningConfig
from sdtp_lib.evaluation.compare import compare_scorers
from sdtp_lib.methods.variant import Variant
from sdtp_lib.processes import Share
from sdtp_lib.records import failures, read_rows
from sdtp_lib.scorers.blend import Blend, average_of_neighbours
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.training import trainer
from sdtp_lib.training.config import TrainingConfig
from sdtp_lib.training.labels import label_column
from sdtp_lib.training.prompts import interleaved

BLEND_PROMPTS = 16  # to choose a blend on
DEFAULT = "sdtp"
# Below this many nats per token a difference matters to nobody: needles must not decide the blend by 0.0001 or 0.0002.
NEGLIGIBLE_NATS = 0.003
KIND_OF = {"digest": "summaries", "summary": "summaries", "text": "text", "code": "text", "own": "own",
           **dict.fromkeys(("closed_qa", "information_extraction", "summarization", "chat", "two questions"),
                           "instructions")}  # fmt: skip


class NothingMeasured(RuntimeError):
    """Not one prompt could be measured; the text has the first failure."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How pruners are made.

    Attributes
    ----------
    labels, smoothing
        Labels of `saliency` that are summed, each over its mean; neighbours (odd) that the sum is averaged over.
    pruner
        Fields of `TokenPruners`: inputs and sizes. ``width`` grows with the model: see `pruner_options`.
    training
        Losses and schedule.
    blends
        Fields of `Blend` to choose from on training-side prompts; none: the learned score alone.
    evidence
        Prompts of `data.evidence` beside each labelled one: their labels are known by how they are made.
    refinement
        Losses and schedule of a second training, from where the first ended and under the first of ``blends``: through
        simulated pruning, on what a cut does to the model's predictions. None: there is none.
    """

    labels: tuple[str, ...]
    smoothing: int
    pruner: Mapping[str, Any]
    training: TrainingConfig
    blends: tuple[Mapping[str, Any], ...] = ()
    refinement: TrainingConfig | None = None
    evidence: float = 0.0

    def pruner_options(self, hidden_size: int) -> dict[str, Any]:
        """`pruner` for a model of this size: a set ``width`` is the least, a sixteenth of the hidden size the rule."""
        width = self.pruner.get("width")
        return {**self.pruner, **({"width": max(width, hidden_size // 16)} if width else {})}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        known = {**dataclasses.asdict(self), "training": self.training.to_dict()}
        if self.refinement is not None:
            known["refinement"] = self.refinement.to_dict()
        # What a recipe does not have is left out: a run of before goes on as the same one.
        if not self.training.input_dropout:
            del known["training"]["input_dropout"]
        return {name: value for name, value in known.items() if name not in ("refinement", "evidence") or value}

    def changed(self, part: str, **changes: Any) -> Recipe:
        """The same with fields of ``pruner`` or ``training`` changed."""
        old = getattr(self, part)
        new = old.replace(**changes) if isinstance(old, TrainingConfig) else {**old, **changes}
        return dataclasses.replace(self, **{part: new})


_SCHEDULE = {"epochs": 10.0, "batch_size": 4, "learning_rate": 2e-3, "weight_decay": 0.05, "eval_share": 0.08,
             "patience": 0, "logging_steps": 20}  # fmt: skip
_OURS = Recipe(
    labels=("removal", "removal_odds"),
    smoothing=3,
    pruner={
        "features": ("hidden", "distance", "query", "attention", "memory"),
        "width": 64, "query_rank": 64, "query_window": 32, "passage_tokens": 65,
    },
    training=TrainingConfig(mse_weight=0.5, rank_weight=1.0, drop_weight=1.0, **_SCHEDULE),
    # The first is what ships for SmolLM2. Another model may get another one: the best on its own training-side prompts.
    blends=tuple(
        {"learned": learned, "attention": attention, "recency": recency, "smoothing": 3}
        for learned, attention, recency in (
            (3.0, 1.0, 0.5), (1.0, 1.0, 0.5), (1.0, 2.0, 0.5), (0.3, 1.0, 0.0), (3.0, 0.0, 0.5), (1.0, 0.0, 0.0),
        )
    ),
)  # fmt: skip
# Thousands of forwards and backwards of the language model: minutes on a GPU, a day on two cores.
_REFINEMENT = TrainingConfig(
    mse_weight=0, rank_weight=0, distill_weight=1.0, distill_floor=NEGLIGIBLE_NATS, keep_ratios=(0.65, 0.95),
    **{**_SCHEDULE, "epochs": 4.0, "learning_rate": 5e-4},
)  # fmt: skip
RECIPES = {
    DEFAULT: _OURS,
    # Gradient x hidden, the hidden state alone, D / 4, regression and ranking over all pairs. The paper's
    # language-model loss is left out: it costs four forwards per prompt and step.
    "paper": Recipe(
        labels=("gradient_x_hidden",), smoothing=1, pruner={"features": ("hidden",)},
        training=TrainingConfig(rank_at_cut=False, staged=False, **_SCHEDULE),
    ),
    "sdtp, refined": dataclasses.replace(_OURS, refinement=_REFINEMENT),
    # For pruners to go on from (start=), averaged with them (start_share=0.5).
    "sdtp, on evidence": dataclasses.replace(
        _OURS, evidence=5 / 3, blends=_OURS.blends[:1],
        training=_OURS.training.replace(epochs=2.0, batch_size=16, learning_rate=1e-3, input_dropout=0.1),
    ),
    "sdtp, hidden alone": _OURS.changed("pruner", features=("hidden",), passage_tokens=0),
    "sdtp, without attention": _OURS.changed("pruner", features=("hidden", "distance", "query", "memory")),
    "sdtp, without passages": _OURS.changed("pruner", passage_tokens=0),
    "sdtp, without memory": _OURS.changed("pruner", features=("hidden", "distance", "query", "attention")),
    "sdtp, whole prompts": _OURS.changed("training", staged=False),
    "sdtp, without rank": _OURS.changed("training", rank_weight=0),
    "sdtp, without rank and mse": _OURS.changed("training", rank_weight=0, mse_weight=0),
}  # fmt: skip


def recipe_named(name: str | Recipe) -> Recipe:
    """The recipe of this name; a `Recipe` as it is.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if isinstance(name, Recipe):
        return name
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is unknown: choose among {', '.join(map(repr, RECIPES))}.")
    return RECIPES[name]


def joined_label(row: dict, layers: Sequence[int], labels: Sequence[str], smoothing: int) -> dict[str, list[float]]:
    """``layer_<l>``: the sum of ``labels``, each over its mean, averaged over ``smoothing`` neighbours."""
    joined = {}
    for layer in layers:
        parts = [torch.tensor(row[label_column(layer, name, labels)], dtype=torch.float64) for name in labels]
        total = sum(part / part.mean().clamp(min=1e-30) for part in parts)[None]
        joined[f"layer_{layer}"] = average_of_neighbours(total, torch.ones_like(total).bool(), smoothing)[0].tolist()
    return joined


def with_evidence(labelled: Any, samples: Sequence[Mapping[str, Any]]) -> Any:
    """A labelled data set with ``samples`` of `data.evidence` behind it, whose column ``evidence`` is their label."""
    if not samples:
        return labelled
    from datasets import Dataset, concatenate_datasets

    rows = [{"sample_id": sample["id"], "category": sample["category"], "evidence": sample["evidence"],
             "input_ids": sample["prompt_ids"] + sample["response_ids"], "prompt_length": len(sample["prompt_ids"])}
            for sample in samples]  # fmt: skip
    return concatenate_datasets([labelled, Dataset.from_list(rows)])


def kind_of(category: str) -> str:
    """The kind of prompt that a sample's category belongs to; any category not listed is a task."""
    return KIND_OF.get(category, "tasks")


def choose_blend(
    model: Any,
    folder: Path,
    blends: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    config: PruningConfig,
    rows: Path,
    provenance: Mapping[str, Any],
    share: Share,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The blend of the pruners in ``folder`` with the lowest KL on ``samples``, and each blend's figure.

    The figure is a geometric mean of KL: over the samples of a kind first, then over kinds, so that none outweighs
    another. Rows are resumable, and shared among the processes of a launch. A single blend is not measured.

    Raises
    ------
    NothingMeasured
        If no prompt could be measured.
    """
    if len(blends) == 1:
        return dict(blends[0]), {}
    pruners = TokenPruners.from_pretrained(str(folder)).to(model.device).eval()
    methods = []
    for blend in blends:
        tried = copy.deepcopy(pruners)
        tried.blend = Blend(**blend)
        methods.append(Variant(json.dumps(dict(blend)), scorer=tried))
    with share.rows(rows, provenance) as writer:
        compare_scorers(model, share.of(samples), {"blend": config}, methods, writer, test_set="blend")
    logs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(rows):
        if row["kind"] == "scorer":
            logs[row["scorer"]][kind_of(row["category"])].append(math.log(row["kl_nats"] + NEGLIGIBLE_NATS))
    figures = {
        name: math.exp(sum(sum(values) / len(values) for values in kinds.values()) / len(kinds))
        for name, kinds in logs.items()
    }
    figures = {method.name: figures[method.name] for method in methods if method.name in figures}
    if not figures:
        raise NothingMeasured(f"no blend could be measured on {len(samples)} prompts: {failures(read_rows(rows))}")
    return json.loads(min(figures, key=figures.__getitem__)), figures


def with_blend(folder: Path, blend: Mapping[str, Any]) -> TokenPruners:
    """The pruners of ``folder`` under another blend."""
    return TokenPruners.from_pretrained(str(folder), blend=dict(blend)).eval()


def held_back(labelled: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """Prompts that training has kept back for its own measure, as samples; the first ones where it kept back none."""
    if "evidence" in labelled.column_names:
        labelled = labelled.filter(lambda row: row["evidence"] is None)
    kept = trainer.split_by_id(labelled, recipe.training)[1]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in kept if kept is not None else labelled:
        prompt, ids = row["prompt_length"], row["input_ids"]
        sample = {"id": row["sample_id"], "category": row["category"], "prompt_ids": ids[:prompt],
                  "response_ids": ids[prompt:]}  # fmt: skip
        by_kind.setdefault(kind_of(row["category"]), []).append(sample)
    return interleaved(*by_kind.values())[:BLEND_PROMPTS]
