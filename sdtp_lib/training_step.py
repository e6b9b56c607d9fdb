"""One training step of the pruners: their losses on a batch, with the language model frozen beside them.

With ``lm_weight`` or ``distill_weight`` the language model runs with pruning *simulated* by masking keys out of
attention (paper, section 3.3), so that gradients reach the pruners. Axes: B batch, S stages, T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdtp_lib import losses
from sdtp_lib.architectures import layer_inputs, position_argument
from sdtp_lib.architectures_asking import attention_looked_back_at
from sdtp_lib.architectures_attention import key_bias
from sdtp_lib.blend import standardised
from sdtp_lib.looking_back import ASKING_TOKENS, LAYERS_BACK, looked_back
from sdtp_lib.pruners import TokenPruners
from sdtp_lib.saliency import has_hidden, load_attention, load_hidden
from sdtp_lib.selection import gather_tokens
from sdtp_lib.training_config import TrainingConfig


@contextlib.contextmanager
def simulated_pruning(
    model: nn.Module, pruners: TokenPruners, prompt_mask: Tensor, keep_ratio: float, config: TrainingConfig
) -> Iterator[dict[int, Tensor]]:
    """Pruning by attention masking inside one forward, each stage scored on what the earlier stages left.

    Scores are those of inference, blend included.

    Yields layer -> keep (B, T), filled by the forward: near 0 where a stage has dropped a token, in the graph.

    Parameters
    ----------
    prompt_mask
        (B, T) bool: the prompt's tokens; padding and response never count as dropped.

    Raises
    ------
    ValueError
        For a blend that asks with another window than the one that training reads.
    """
    run = _Simulation(pruners, prompt_mask, keep_ratio, config)
    with (
        layer_inputs(model, pruners.layers) as run.seen,
        attention_looked_back_at(model, run.back, ASKING_TOKENS, run.living) as run.paid,
        key_bias(model, run.bias),
    ):
        yield run.keeps


class _Simulation:
    """One forward under simulated pruning: who is alive so far, and how little of a token each stage has left."""

    def __init__(self, pruners: TokenPruners, prompt_mask: Tensor, keep_ratio: float, config: TrainingConfig) -> None:
        self.pruners, self.keep_ratio, self.config = pruners, keep_ratio, config
        self.back = pruners.looked_back
        if pruners.blend is not None and pruners.blend.attention:
            if pruners.blend.window != ASKING_TOKENS:
                raise ValueError(
                    f"blend.window={pruners.blend.window} cannot be simulated in training: give {ASKING_TOKENS}, or no "
                    "blend."
                )
            self.back = self.back or looked_back(pruners.layers)
        self.positions = (prompt_mask.long().cumsum(-1) - 1).masked_fill(~prompt_mask, -1)
        self.lengths = prompt_mask.sum(-1)
        self.alive = prompt_mask
        self.keeps: dict[int, Tensor] = {}
        self.log_keep: Tensor | None = None  # (B, T), the sum over the stages so far
        self.memory: Tensor | None = None  # (B, T), the pruner's own scores at the stage before
        # Filled by the forward: what enters each layer, and what was just attended to.
        self.seen: dict[int, Tensor] = {}
        self.paid: dict[int, Tensor] = {}

    def living(self, index: int) -> Tensor:
        """(B, T) who lives at layer ``index``; asked for by whoever reads attention there."""
        # What the stage is shown is complete by then, so its cut comes before others look at this layer.
        if index in self.paid:
            self._cut(index)
        return self.alive

    def bias(self, index: int, key: Tensor) -> Tensor | None:
        """(B, T) what is added to the attention scores of each key at layer ``index``; None before the first cut."""
        self._cut(index)
        return None if self.log_keep is None else self.log_keep.to(key.device, key.dtype)

    def _cut(self, index: int) -> None:
        # A recomputed forward would ask again; the stages of one forward come once each, in order.
        if index not in self.pruners.layers or index in self.keeps:
            return
        config = self.config
        scores = self._scores(index)
        open_to_cut = self.alive & losses.scorable(
            self.alive, config.sink_tokens, config.local_ratio, config.min_local_tokens
        )
        living, free = self.alive.sum(-1, keepdim=True), open_to_cut.sum(-1, keepdim=True)
        share = (living * self.keep_ratio - (living - free)).clamp(min=0) / free.clamp(min=1)
        soft = losses.soft_keep(scores, open_to_cut, share, config.temperature, config.keep_floor)
        hard = torch.where(soft >= (1 + config.keep_floor) / 2, 1.0, config.keep_floor).to(soft.dtype)
        keep = losses.straight_through(soft, hard) if config.straight_through else soft
        self.keeps[index] = keep
        self.alive = self.alive & (hard > 0.5)
        self.log_keep = keep.log() if self.log_keep is None else self.log_keep + keep.log()

    def _scores(self, index: int) -> Tensor:
        """(B, T) scores as the engine has them, from the living tokens side by side; 0 elsewhere."""
        pruners, order, left = self.pruners, *_side_by_side(self.alive)
        mass = gather_tokens(self.paid[index], order) if index in self.paid else None
        own = mass if pruners.looked_back else None
        places = self.positions.gather(1, order)
        memory = None if self.memory is None else self.memory.gather(1, order)
        scores = pruners.score(index, gather_tokens(self.seen[index], order), places, left, self.lengths, own, memory)
        self.memory = _at_all(standardised(scores, left).detach(), order, self.alive)
        if pruners.blend is not None:
            heads = None if mass is None else mass.chunk(LAYERS_BACK, dim=-1)[-1].transpose(1, 2)
            scores = pruners.blend.mixed(scores, left, places, heads)
        return _at_all(scores, order, self.alive)


class PrunerLoss(nn.Module):
    """What `Trainer` trains: the pruners with their losses. The language model is no submodule, so it is not saved."""

    def __init__(
        self, pruners: TokenPruners, language_model: nn.Module, layers: tuple[int, ...], config: TrainingConfig
    ) -> None:
        super().__init__()
        self.pruners, self.layers, self.settings = pruners, layers, config
        self._frozen = (language_model,)
        self.draws = torch.Generator().manual_seed(config.seed)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_mask: Tensor,
        labels: Tensor,
        hidden: Tensor | None = None,
        attention: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        ``labels`` (B, S, T) are saliency by stage; ``hidden`` (B, S, T, D) and ``attention`` (B, S, T, A) the pruners'
        other inputs where they were stored with it.
        """
        config = self.settings
        (language_model,) = self._frozen
        device = next(self.pruners.parameters()).device
        at = language_model.get_input_embeddings().weight.device
        if device != at and not hasattr(language_model, "hf_device_map"):
            language_model.to(device)
        keep_ratio = self._keep_ratio()
        teacher = None
        if config.needs_labels and hidden is None or config.distill_weight:
            back = self.pruners.looked_back
            with (
                torch.no_grad(),
                layer_inputs(language_model, self.layers) as seen,
                attention_looked_back_at(language_model, back, ASKING_TOKENS, lambda _layer: prompt_mask) as paid,
            ):
                teacher = self._response_logits(language_model, input_ids, attention_mask, prompt_mask)[0]
            by_layer = {layer: (seen[layer].to(device), _moved(paid.get(layer), device)) for layer in self.layers}
        if hidden is not None:
            paid = [None] * len(self.layers) if attention is None else attention.unbind(dim=1)
            by_layer = dict(zip(self.layers, zip(hidden.unbind(dim=1), paid, strict=True), strict=True))
        parts: dict[str, Tensor] = {}
        if config.needs_labels:
            parts |= self._label_losses(by_layer, prompt_mask, labels, keep_ratio)
        if config.simulates_pruning:
            with simulated_pruning(language_model, self.pruners, prompt_mask, keep_ratio, config):
                student, targets = self._response_logits(language_model, input_ids, attention_mask, prompt_mask)
            if config.lm_weight:
                parts["lm"] = F.cross_entropy(student.float(), targets)
            if config.distill_weight:
                parts["distill"] = losses.distillation(student, teacher)
        weights = config.weights()
        total = sum(weights[name] * value for name, value in parts.items())
        return {"loss": total, **{f"{name}_loss": value.detach() for name, value in parts.items()}}

    def _keep_ratio(self) -> float:
        low, high = self.settings.keep_ratios
        if not self.training:
            return self.settings.eval_ratio
        return low + (high - low) * torch.rand((), generator=self.draws).item()

    def _label_losses(
        self, by_layer: dict[int, tuple[Tensor, Tensor | None]], prompt_mask: Tensor, labels: Tensor, keep_ratio: float
    ) -> dict[str, Tensor]:
        config = self.settings
        positions = (prompt_mask.long().cumsum(-1) - 1).masked_fill(~prompt_mask, -1)
        lengths, alive, memory = prompt_mask.sum(-1), prompt_mask, None
        found: dict[str, list[Tensor]] = {name: [] for name in ("mse", "rank", "drop")}
        for stage, layer in enumerate(self.layers):
            states, paid = by_layer[layer]
            order, left = _side_by_side(alive)
            mass = None if paid is None else _share_of_living(gather_tokens(paid, order), left)
            before = None if memory is None else memory.gather(1, order)
            scores = self.pruners.score(
                layer, gather_tokens(states, order), positions.gather(1, order), left, lengths, mass, before
            )
            memory = _at_all(standardised(scores, left).detach(), order, alive)
            saliency = labels[:, stage].gather(1, order)
            counted = losses.scorable(left, config.sink_tokens, config.local_ratio, config.min_local_tokens)
            if config.mse_weight:
                found["mse"].append(losses.masked_mse(scores, losses.log_saliency(saliency, counted), counted))
            if config.rank_weight:
                sides = (
                    losses.cut_weights(saliency, counted, keep_ratio, config.rank_width)
                    if config.rank_at_cut
                    else (None, None)
                )
                found["rank"].append(losses.pairwise_ranking(scores, saliency, counted, *sides))
            if config.drop_weight:
                found["drop"].append(losses.dropped_saliency(scores, saliency, counted, keep_ratio))
            if config.staged:
                dropped = counted & ~losses.highest(scores.detach(), counted, keep_ratio)
                alive = alive & ~_at_all(dropped, order, alive)
        return {name: torch.stack(values).mean() for name, values in found.items() if values}

    @staticmethod
    def _response_logits(
        language_model: nn.Module, input_ids: Tensor, attention_mask: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, V) logits that predict the response tokens, and these tokens (N,)."""
        response = attention_mask.bool() & ~prompt_mask
        first = int(response.any(0).nonzero()[0])
        logits = language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=input_ids.shape[1] - first + 1,
            **position_argument(language_model, (attention_mask.cumsum(-1) - 1).clamp(min=0)),
        ).logits[:, :-1]
        here = response[:, first:]
        return logits[here], input_ids[:, first:][here]


class Collator:
    """Left-padded batches. Labels are put beside the very tokens that they were computed for."""

    def __init__(self, layers: tuple[int, ...], back: Mapping[int, Sequence[int]] | None = None) -> None:
        """``back``: the layers whose attention the pruners look back at (`TokenPruners.looked_back`)."""
        self.layers, self.back = layers, dict(back or {})

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
            "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
            "prompt_mask": torch.zeros(len(rows), width, dtype=torch.bool),
            "labels": torch.zeros(len(rows), len(self.layers), width),
        }
        stored = self._stored(rows)
        for name, kept in stored.items():
            batch[name] = torch.zeros(len(rows), len(self.layers), width, kept[0].shape[-1])
        for index, row in enumerate(rows):
            start, prompt = width - len(row["input_ids"]), row["prompt_length"]
            batch["input_ids"][index, start:] = torch.tensor(row["input_ids"])
            batch["attention_mask"][index, start:] = 1
            batch["prompt_mask"][index, start : start + prompt] = True
            for stage, layer in enumerate(self.layers):
                batch["labels"][index, stage, start : start + prompt] = torch.tensor(row[f"layer_{layer}"])
            for name, kept in stored.items():
                batch[name][index, :, start : start + prompt] = kept[index].float()
        return batch

    def _stored(self, rows: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
        """``hidden`` (S, P, D) and, if looked at, ``attention`` (S, P, A) a row; nothing if they were not kept."""
        if not all(row.get("file") and has_hidden(row["file"], self.back) for row in rows):
            return {}
        readers = {"hidden": load_hidden, **({"attention": load_attention} if self.back else {})}
        return {
            name: [torch.stack([read(row["file"], layer) for layer in self.layers]) for row in rows]
            for name, read in readers.items()
        }


def _side_by_side(alive: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (B, K) of the living tokens of (B, T), in order and first, and which of them (B, K) do live."""
    order = (~alive).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(alive.sum(-1).max())]
    return order, alive.gather(1, order)


def _at_all(values: Tensor, order: Tensor, alive: Tensor) -> Tensor:
    """``values`` (B, K) of the living put back at their columns ``order``: (B, T), 0 elsewhere."""
    return torch.zeros_like(alive, dtype=values.dtype).scatter(1, order, values)


def _share_of_living(mass: Tensor, left: Tensor) -> Tensor:
    """Attention (B, K, A) paid by `ASKING_TOKENS` askers, as if what they paid to dropped tokens went to the living."""
    mass = mass * left[..., None]
    return mass * (ASKING_TOKENS / mass.sum(dim=1, keepdim=True).clamp_min(1e-6))


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
