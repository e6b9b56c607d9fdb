"""Labels: how much each prompt token matters at each pruned layer, from one forward and one backward pass.

Knows models (through `architectures`) and labels, not pruners. No gradient of a weight is ever computed. Axes: B batch,
T tokens, R response tokens, G key/value heads, L layers.

- ``gradient_x_hidden``: the paper's label, ``|sum_d (dLoss/dx)_d x_d|`` at the input x of the pruned layer.
- ``removal``: ``sum over layers l >= stage of |dLoss/db_l|`` with b_l a zero bias on each key of layer l: the
  first-order effect of what pruning does, which is to remove a token as a key from every later layer.
- ``removal_by_head``: the same with one bias for each key/value head, absolute values before the sum.
- ``removal_joint``: the absolute value after the sum over layers.
- ``removal_raises``: only what raises the loss; removal counts also what lowers it.
- ``removal_odds``: removal, of the response tokens' log-odds under random signs instead of their summed loss. A loss is
  flat where the model is sure of its answer, and effects on different response tokens cancel in a sum; log-odds are not
  flat, and random signs keep effects from cancelling.
- ``attention_entropy``: each key's share in the entropy of the response tokens' attention at that layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdtp_lib.architectures.attention_bias import attention_bias, attention_mask_out, bias_route
from sdtp_lib.architectures.attention_readings import attention_in_forward, refuse_unreadable
from sdtp_lib.architectures.layers import Architecture, describe, layer_inputs, position_argument
from sdtp_lib.config import PruningNotSupported

LABELS = (
    "gradient_x_hidden", "removal", "removal_by_head", "removal_joint", "removal_raises", "removal_odds",
    "attention_entropy",
)  # fmt: skip
DEFAULT_LABEL = "removal"
LOSS_ON = ("response", "all", "continuation")
_ODDS_SEED = 20250404


def label_column(layer: int, label: str, labels: Sequence[str]) -> str:
    """The column of a labelled data set with ``label`` at ``layer``; the first of its ``labels`` has no suffix."""
    return f"layer_{layer}" if label == labels[0] else f"layer_{layer}_{label}"


def saliency_of(
    model: nn.Module | Architecture,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    layers: Sequence[int],
    label: str | Sequence[str] = DEFAULT_LABEL,
    keep: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor] | dict[str, dict[int, Tensor]]:
    """Saliency of every token at each of ``layers`` for the loss over the tokens in ``response_mask``.

    Parameters
    ----------
    input_ids, attention_mask, response_mask
        (B, T). Rows are padded on the left; ``attention_mask`` is 0 at padding; ``response_mask`` is 1 at the tokens
        whose prediction makes the loss (all 1 for a loss over all tokens).
    layers
        0-based layers, ascending or not.
    label
        One of `LABELS`, or several, computed together.
    keep
        Stage -> (B, T), 0 at tokens that are gone from that layer on: the labels of a prompt that is cut there already.

    Returns
    -------
    dict
        layer -> (B, T) float32, non-negative, 0 at padding. With several labels: label -> that.

    Raises
    ------
    ValueError
        For an unknown label, a row without response tokens, or layers that the model lacks.
    PruningNotSupported
        Before any compute, for families whose attention takes no bias that can be verified, or shows no weights.
    """
    architecture = describe(model)
    labels = checked_labels(architecture, layers, label)
    if keep:
        bias_route(architecture)  # found before the hooks below are on, for it runs the model
    model, depth = architecture.model, len(architecture.layers)
    attention_mask, response_mask = attention_mask.bool(), response_mask.bool() & attention_mask.bool()
    # The first real token is predicted from nothing.
    targets = response_mask & (attention_mask.long().cumsum(-1) > 1)
    if not targets.any(-1).all():
        raise ValueError("response_mask: a row has no token to predict; give each prompt a response.")
    by_head = "removal_by_head" in labels
    wants_bias = any(name.startswith("removal") for name in labels)
    wants_hidden = "gradient_x_hidden" in labels
    forward = {"attention_mask": attention_mask.long(), "use_cache": False}
    forward |= position_argument(model, (attention_mask.long().cumsum(-1) - 1).clamp(min=0))
    if wants_hidden:
        # Somewhere the graph must begin: at the embeddings, since no weight takes a gradient.
        forward["inputs_embeds"] = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    else:
        forward["input_ids"] = input_ids
    # Logits for the response only: over all tokens they would be T x vocabulary. Example: 14 tokens, the last 4 are the
    # response. first = 10, to_keep = 5: logits at 9 .. 13, of which 9 .. 12 predict tokens 10 .. 13. Some families give
    # all logits all the same, so the slice below counts from the end.
    first = int(targets.any(0).nonzero()[0])
    to_keep = forward["logits_to_keep"] = input_ids.shape[1] - first + 1

    biased = range(min(layers), depth)
    entropy_at = layers if "attention_entropy" in labels else ()
    is_query = targets[:, first:]

    def entropy_share(layer: int, attention: Tensor) -> Tensor:
        # attention (B, H, R, T): each key's term of -sum p log p, mean over heads, then over the row's response tokens.
        queries = is_query.to(attention.device)
        for left in (left.to(attention) for stage, left in (keep or {}).items() if stage <= layer):
            # Attention is read without the bias: the part of tokens that are gone is shared among the rest, sinks too.
            stays = attention * left[:, None, None]
            attention = stays / (1 - (attention - stays).sum(-1, keepdim=True)).clamp(min=1e-6)
        share = -torch.xlogy(attention, attention).mean(1) * queries[..., None]
        return share.sum(1) / queries.sum(-1, keepdim=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad() if wants_bias or wants_hidden else torch.no_grad())
        seen = stack.enter_context(layer_inputs(architecture, layers if wants_hidden else ()))
        entropy = stack.enter_context(
            attention_in_forward(architecture, entropy_at, input_ids.shape[1] - first, entropy_share)
        )
        bias = {}
        if wants_bias or keep:
            bias = stack.enter_context(attention_bias(architecture, biased, by_head, keep))
        logits = model(**forward).logits[:, -to_keep:-1].float()
        loss_at = F.cross_entropy(logits.transpose(1, 2), input_ids[:, first:], reduction="none")
        loss_at = loss_at * targets[:, first:]
        found = {}
        needs_loss = set(labels) - {"removal_odds", "attention_entropy"}
        needs_odds = "removal_odds" in labels
        if needs_loss:
            wanted = [*bias.values(), *([seen[layer] for layer in layers] if wants_hidden else [])]
            gradients = torch.autograd.grad(loss_at.sum(), wanted, retain_graph=needs_odds)
            at_bias = dict(zip(bias, gradients, strict=False))
            found |= _removal(at_bias, layers, depth, set(labels), by_head)
            if wants_hidden:
                at_hidden = dict(zip(layers, gradients[len(bias) :], strict=True))
                found["gradient_x_hidden"] = {i: (at_hidden[i] * seen[i]).sum(-1).abs() for i in layers}
        if needs_odds:
            odds = _signed_log_odds(loss_at, targets[:, first:])
            at_bias = dict(zip(bias, torch.autograd.grad(odds, list(bias.values())), strict=True))
            found["removal_odds"] = _removal(at_bias, layers, depth, {"removal"}, by_head)["removal"]
    found["attention_entropy"] = entropy
    found = {
        name: {i: found[name][i].detach().float() * attention_mask.to(found[name][i].device) for i in layers}
        for name in labels
    }
    return found[label] if isinstance(label, str) else found


def checked_labels(
    model: nn.Module | Architecture, layers: Sequence[int], label: str | Sequence[str]
) -> tuple[str, ...]:
    """The wanted labels, or an error where ``model`` cannot have them: `ValueError` or `PruningNotSupported`.

    Tries a bias and reads attention on a short prompt, so it must come before hooks of a caller's own.
    """
    labels = (label,) if isinstance(label, str) else tuple(label)
    if unknown := [name for name in labels if name not in LABELS]:
        raise ValueError(f"label={unknown} is unknown: choose among {', '.join(LABELS)}.")
    architecture = describe(model)
    depth = len(architecture.layers)
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ValueError(f"layers={list(layers)}: name layers from 0 to {depth - 1} of this model.")
    if architecture.with_state:
        # Removal is a bias on keys, which these layers do not have; a label without their part would mislead.
        raise PruningNotSupported(
            f"{type(architecture.model).__name__}: layers {sorted(architecture.with_state)} keep a state instead of "
            "keys, and what a token does to it is not in any label: prune it with a score that needs no training."
        )
    if any(name.startswith("removal") for name in labels):
        bias_route(architecture)
    if "attention_entropy" in labels:
        refuse_unreadable(architecture, layers)
    return labels


def _removal(
    gradient: dict[int, Tensor], layers: Sequence[int], depth: int, labels: set[str], by_head: bool
) -> dict[str, dict[int, Tensor]]:
    """The removal labels at every stage as sums over the layers from it on, from the deepest layer backwards."""
    found: dict[str, dict[int, Tensor]] = {name: {} for name in labels if name.startswith("removal")}
    found.pop("removal_odds", None)
    total: dict[str, Any] = dict.fromkeys(found, 0.0)
    # Six layers, stages at 2 and 4, g_l = dLoss/db_l: stage 4 gets |g5| + |g4|, and stage 2 goes on to + |g3| + |g2|.
    for layer in reversed(range(min(layers), depth)):
        if layer in gradient:
            here = gradient[layer].float()
            joined = here.sum(1) if by_head else here
            for name in found:
                if name == "removal_by_head":
                    term = here.abs().sum(1)
                elif name == "removal_raises":  # the loss falls as this key's bias rises
                    term = (-joined).clamp(min=0)
                else:
                    term = joined if name == "removal_joint" else joined.abs()
                # Layers may live on different devices.
                total[name] = term + (total[name].to(term.device) if torch.is_tensor(total[name]) else 0.0)
        if layer in layers:
            for name in found:
                found[name][layer] = total[name].abs()
    return found


def _signed_log_odds(loss_at: Tensor, targets: Tensor) -> Tensor:
    """Sum over response tokens of +-log(p / (1 - p)), p the probability of the token; signs are fixed by place.

    The place is that in the row's own response, so that a row gets the same signs in any batch.
    """
    generator = torch.Generator().manual_seed(_ODDS_SEED)
    signs = torch.randint(0, 2, (loss_at.shape[1],), generator=generator).mul(2).sub(1).to(loss_at.device)
    # Two rows of 5 columns, responses of 5 and 3 tokens, both at the end: places 0 .. 4 and 0, 0, 0, 1, 2.
    place = torch.arange(loss_at.shape[1], device=loss_at.device) - targets.long().argmax(-1, keepdim=True)
    signs = signs[place.clamp(min=0)]
    # log(1 - p) by expm1; kept off 0, where float32 logits say p = 1.
    rest = (-torch.expm1(-loss_at)).clamp(min=1e-4)
    return ((-loss_at - rest.log()) * signs * targets).sum()


@torch.no_grad()
def block_effects(
    model: nn.Module, input_ids: Tensor, response_mask: Tensor, layer: int, block_tokens: int = 16, batch_size: int = 8
) -> Tensor:
    """The gold check of a label: KL of the response when a block of prompt tokens is removed from ``layer`` on.

    Parameters
    ----------
    input_ids, response_mask
        (1, T), no padding; the response is the end of the row.
    block_tokens
        Tokens removed together; neighbours carry the same information, and single tokens hardly show.

    Returns
    -------
    Tensor
        (ceil(P / block_tokens),) nats per response token, for the P prompt tokens in order.
    """
    prompt_length = int((~response_mask.bool()).sum())
    to_keep = input_ids.shape[1] - prompt_length + 1
    full = model(input_ids, use_cache=False, logits_to_keep=to_keep).logits[0, :-1].float().log_softmax(-1)
    starts = list(range(0, prompt_length, block_tokens))
    effects = []
    for begin in range(0, len(starts), batch_size):
        some = starts[begin : begin + batch_size]
        keep = torch.ones(len(some), input_ids.shape[1], device=input_ids.device)
        for row, start in enumerate(some):
            keep[row, start : min(start + block_tokens, prompt_length)] = 0
        with attention_mask_out(model, {layer: keep}):
            output = model(input_ids.expand(len(some), -1), use_cache=False, logits_to_keep=to_keep)
        pruned = output.logits[:, :-1].float().log_softmax(-1)
        effects.append((full.exp() * (full - pruned)).sum(-1).mean(-1))
    return torch.cat(effects)
