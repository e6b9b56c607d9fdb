"""One training step of the pruners: their losses on a batch, with the language model frozen beside them.

Axes: B batch, S stages, T tokens, P prompt tokens, D hidden size, A attention inputs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdtp_lib.architectures.attention_readings import attention_of_earlier_layers
from sdtp_lib.architectures.layers import describe, layer_inputs, pad_left, position_argument
from sdtp_lib.pruning.stage import QUERY_TOKENS
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.training import losses
from sdtp_lib.training.config import TrainingConfig
from sdtp_lib.training.saliency import stored_inputs
from sdtp_lib.training.simulation import KeptTokens, simulated_pruning

LEAST_EVIDENCE = 0.02  # of a token that is none: the regression is on logarithms


class PrunerLoss(nn.Module):
    """What `Trainer` trains: the pruners with their losses. The language model is no submodule, so it is not saved."""

    def __init__(
        self, pruners: TokenPruners, language_model: nn.Module, layers: tuple[int, ...], config: TrainingConfig
    ) -> None:
        super().__init__()
        self.pruners, self.layers, self.settings = pruners, layers, config
        # In a tuple, or it would be a submodule.
        self._frozen = (language_model, describe(language_model))
        self.number = 0  # of the step, set by the trainer: a run that goes on draws the ratio that it would have drawn

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_mask: Tensor,
        labels: Tensor,
        hidden: Tensor | None = None,
        attention: Tensor | None = None,
        protect_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        ``labels`` (B, S, T) are saliency by stage; ``hidden`` (B, S, T, D) and ``attention`` (B, S, T, A) the pruners'
        other inputs where they were stored with it. ``protect_mask`` (B, T) are tokens that no stage drops; they take
        part in no loss. A sample's ``loss_mask`` is in its labels; losses on predictions look at the whole response.
        """
        config = self.settings
        language_model, architecture = self._frozen
        device = next(self.pruners.parameters()).device
        at = language_model.get_input_embeddings().weight.device
        if device != at and not hasattr(language_model, "hf_device_map"):
            language_model.to(device)
        keep_ratio = self._keep_ratio()
        teacher = None
        if config.needs_labels and hidden is None or config.distill_weight:
            back = self.pruners.earlier_layers
            with (
                torch.no_grad(),
                layer_inputs(architecture, self.layers) as seen,
                attention_of_earlier_layers(architecture, back, QUERY_TOKENS, lambda _layer: prompt_mask) as paid,
            ):
                if config.distill_weight:
                    teacher = self._response_logits(language_model, input_ids, attention_mask, prompt_mask)[0]
                else:
                    self._logits(language_model, input_ids, attention_mask, 1)
            by_layer = {layer: (seen[layer].to(device), _moved(paid.get(layer), device)) for layer in self.layers}
        if hidden is not None:
            paid = [None] * len(self.layers) if attention is None else attention.unbind(dim=1)
            by_layer = dict(zip(self.layers, zip(hidden.unbind(dim=1), paid, strict=True), strict=True))
        parts: dict[str, Tensor] = {}
        if config.needs_labels:
            parts |= self._label_losses(by_layer, prompt_mask, labels, keep_ratio, protect_mask)
        if config.simulates_pruning:
            with simulated_pruning(architecture, self.pruners, prompt_mask, keep_ratio, config, protect_mask):
                student, targets = self._response_logits(language_model, input_ids, attention_mask, prompt_mask)
            if config.lm_weight:
                parts["lm"] = F.cross_entropy(student.float(), targets)
            if config.distill_weight:
                prompt = (attention_mask.bool() & ~prompt_mask).nonzero()[:, 0]
                parts["distill"] = losses.distillation(student, teacher, prompt, config.distill_floor)
        weights = config.weights()
        total = sum(weights[name] * value for name, value in parts.items())
        return {"loss": total, **{f"{name}_loss": value.detach() for name, value in parts.items()}}

    def _keep_ratio(self) -> float:
        low, high = self.settings.keep_ratios
        if not self.training:
            return self.settings.eval_ratio
        return low + (high - low) * random.Random(f"{self.settings.seed} {self.number}").random()

    def _label_losses(
        self,
        by_layer: dict[int, tuple[Tensor, Tensor | None]],
        prompt_mask: Tensor,
        labels: Tensor,
        keep_ratio: float,
        protect_mask: Tensor | None,
    ) -> dict[str, Tensor]:
        config, tokens = self.settings, KeptTokens(self.pruners, prompt_mask, protect_mask)
        found: dict[str, list[Tensor]] = {name: [] for name in ("mse", "rank", "drop")}
        for stage, layer in enumerate(self.layers):
            hidden, paid = by_layer[layer]
            scores = tokens.score(layer, F.dropout(hidden, config.input_dropout, self.training), paid)
            saliency = labels[:, stage].gather(1, tokens.order)
            counted = tokens.open_to_cut(config).gather(1, tokens.order)
            kept = tokens.kept(keep_ratio, counted)
            if config.mse_weight:
                found["mse"].append(losses.masked_mse(scores, losses.log_saliency(saliency, counted), counted))
            if config.rank_weight:
                sides = (
                    losses.cut_weights(saliency, counted, kept, config.rank_width)
                    if config.rank_at_cut
                    else (None, None)
                )
                found["rank"].append(losses.pairwise_ranking(scores, saliency, counted, *sides))
            if config.drop_weight:
                found["drop"].append(losses.dropped_saliency(scores, saliency, counted, kept))
            if config.staged:
                dropped = counted & ~losses.highest(scores.detach(), counted, kept)
                tokens.mask = tokens.mask & ~tokens.put_back(dropped)
        return {name: torch.stack(values).mean() for name, values in found.items() if values}

    @staticmethod
    def _logits(language_model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        positions = position_argument(language_model, (attention_mask.cumsum(-1) - 1).clamp(min=0))
        return language_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=keep, **positions
        ).logits

    @staticmethod
    def _response_logits(
        language_model: nn.Module, input_ids: Tensor, attention_mask: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, V) logits that predict the response tokens, and these tokens (N,)."""
        response = attention_mask.bool() & ~prompt_mask
        # 14 tokens, the last 4 the response: logits at 9 .. 13, and without the last those that predict 10 .. 13.
        first = int(response.any(0).nonzero()[0])
        keep = input_ids.shape[1] - first + 1
        logits = PrunerLoss._logits(language_model, input_ids, attention_mask, keep)[:, :-1]
        here = response[:, first:]
        return logits[here], input_ids[:, first:][here]


class Collator:
    """Left-padded batches. Labels are padded like the tokens that they were computed for; evidence is each stage's."""

    def __init__(self, layers: tuple[int, ...], back: Mapping[int, Sequence[int]] | None = None) -> None:
        """``back``: stage -> the earlier layers whose attention it reads (`TokenPruners.earlier_layers`)."""
        self.layers, self.back = layers, dict(back or {})

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad_left([row["input_ids"] for row in rows])
        width = ids.shape[1]
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "prompt_mask": torch.zeros(len(rows), width, dtype=torch.bool),
            "labels": torch.zeros(len(rows), len(self.layers), width),
        }
        stored = [stored_inputs(row["file"], self.layers, self.back) if row.get("file") else {} for row in rows]
        if not all(stored):
            stored = [{}] * len(rows)
        for name, kept in stored[0].items():
            batch[name] = torch.zeros(len(rows), len(self.layers), width, kept.shape[-1])
        if any(row.get("protect") is not None for row in rows):
            batch["protect_mask"] = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, row in enumerate(rows):
            start, prompt = width - len(row["input_ids"]), row["prompt_length"]
            batch["prompt_mask"][index, start : start + prompt] = True
            if row.get("protect") is not None:
                batch["protect_mask"][index, start : start + prompt] = torch.tensor(row["protect"])
            prompt_labels = batch["labels"][index, :, start : start + prompt]
            if row.get("evidence") is not None:
                prompt_labels[:] = torch.tensor(row["evidence"]).clamp(min=LEAST_EVIDENCE)
            else:
                prompt_labels[:] = torch.tensor([row[f"layer_{layer}"] for layer in self.layers])
            for name, kept in stored[index].items():
                batch[name][index, :, start : start + prompt] = kept.float()
        return batch


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
