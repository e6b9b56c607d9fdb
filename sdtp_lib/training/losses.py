"""What the token pruners are trained on: regression, ranking and distillation, as pure functions of tensors.

Knows no model, no configuration, no data set. Scores and labels are (B, T): one row per prompt, one column per token.
Every function takes ``valid`` (B, T): only there does a token take part. Padding and protected tokens (the sinks and
the last ones, which stay whatever their score) belong outside: see `scorable`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdtp_lib import budget
from sdtp_lib.scorers.blend import standardised

# Rows of the pair matrix in memory at once: 256 x 8,192 float32 is 8 MiB a temporary.
_ROWS_AT_ONCE = 256


def scorable(valid: Tensor, sink_tokens: int, local_ratio: float, min_local_tokens: int) -> Tensor:
    """The tokens whose score decides anything: real ones that are neither sinks nor among the protected last.

    Parameters
    ----------
    valid
        (B, T) bool, True for prompt tokens (not padding, not response).
    sink_tokens, local_ratio, min_local_tokens
        As in `PruningConfig`: the first few and the last ``max(min_local_tokens, ceil(local_ratio * n))`` always stay.

    Returns
    -------
    Tensor
        (B, T) bool.
    """
    # A row of 10 columns whose last 8 are a prompt: order is -1, -1, 0 .. 7. With 2 sinks and the last token protected,
    # columns 4 to 8 are left.
    order = valid.long().cumsum(-1) - 1
    count = valid.sum(-1, keepdim=True)
    last = [budget.local_count(tokens, local_ratio, min_local_tokens) for tokens in count[:, 0].tolist()]
    last = torch.tensor(last, device=valid.device)[:, None]
    return valid & (order >= sink_tokens) & (order < count - last)


def log_saliency(saliency: Tensor, valid: Tensor, floor: float = 1e-3) -> Tensor:
    """Saliency (B, T), heavy-tailed and of arbitrary scale, as standardised logarithms.

    ``floor`` is a share of the row's mean: what lies below it is as good as nothing, and its logarithm would rule.
    """
    weight = valid.to(saliency.dtype)
    mean = (saliency.masked_fill(~valid, 0) * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1)
    mean = mean.clamp(min=torch.finfo(saliency.dtype).tiny)
    return standardised((saliency / mean + floor).log(), valid)


def masked_mse(scores: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The paper's L_mse: mean squared difference over the valid tokens of (B, T), a scalar; 0 where none is valid."""
    difference = (scores - labels).masked_fill(~valid, 0)
    return difference.square().sum() / valid.sum().clamp(min=1)


def cut_weights(labels: Tensor, valid: Tensor, kept: Tensor, width: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weights that let `pairwise_ranking` look only at pairs on opposite sides of the cut.

    Parameters
    ----------
    labels, valid
        (B, T).
    kept
        (B,) how many of each row's valid tokens are above the cut.
    width
        Share of the tokens after which a token's weight has fallen to 1/e with its distance (in ranks) from the cut;
        0 weighs all alike.

    Returns
    -------
    tuple of Tensor
        ``upper`` and ``lower`` (B, T): how much a token counts as the upper and as the lower one of a pair.
    """
    rank = _ranks(labels, valid)
    count = valid.sum(-1, keepdim=True)
    # Five tokens in the order of their labels, two above the cut: offsets -1.5, -0.5 | 0.5, 1.5, 2.5. With a width of
    # one token the weights are 0.22, 0.61 | 0.61, 0.22, 0.08: pairs far from the cut do not change what is dropped.
    offset = rank + 0.5 - kept[:, None]
    weight = torch.exp(-offset.abs() / (width * count).clamp(min=1)) if width > 0 else torch.ones_like(offset)
    above = (offset < 0) & valid
    return (weight * above).to(labels.dtype), (weight * (~above & valid)).to(labels.dtype)


def pairwise_ranking(
    scores: Tensor, labels: Tensor, valid: Tensor, upper: Tensor | None = None, lower: Tensor | None = None
) -> Tensor:
    """The paper's L_rank, exact over all pairs, in memory linear in T.

    ``sum over pairs of log(1 + exp(-(s_i - s_j) * sign(y_i - y_j)))``, divided by the weight of the pairs, so that
    prompts of any length weigh alike; the mean over rows. Pairs of equal labels have no order and are left out, as are
    pairs with an invalid token.

    Parameters
    ----------
    scores
        (B, T), differentiable.
    labels, valid
        (B, T) the wanted order, and which tokens take part.
    upper, lower
        (B, T) optional weights of a token as the better and as the worse one of a pair (`cut_weights`); the pair
        weighs their product.

    Returns
    -------
    Tensor
        A scalar: about log 2 for scores without information, towards 0 for the right order.
    """
    ones = valid.to(scores.dtype)
    upper = ones if upper is None else upper.to(scores.dtype) * ones
    lower = ones if lower is None else lower.to(scores.dtype) * ones
    return _PairwiseRanking.apply(scores, labels, upper, lower)


def dropped_saliency(scores: Tensor, saliency: Tensor, valid: Tensor, kept: Tensor, temperature: float = 0.5) -> Tensor:
    """The share of a row's saliency that a soft cut would drop; the mean over rows.

    First-order damage of pruning: removal saliency says what each token's absence costs, and a stage drops the lowest
    scores. The step at the cut is softened to a sigmoid of the standardised score over ``temperature``.

    Parameters
    ----------
    scores, saliency, valid
        (B, T); saliency is non-negative.
    kept
        (B,) how many of each row's valid tokens stay.
    """
    standard = standardised(scores, valid)
    threshold = _threshold(standard, valid, kept)
    with torch.no_grad():
        weight = saliency.masked_fill(~valid, 0)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight * torch.sigmoid((threshold - standard) / temperature)).sum(-1).mean()


def highest(scores: Tensor, valid: Tensor, kept: Tensor) -> Tensor:
    """(B, T) bool: those ``kept`` (B,) of the valid tokens that score highest; ties: the later token."""
    return valid & (_ranks(scores, valid) < kept[:, None])


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, prompt: Tensor | None = None, floor: float = 0.0
) -> Tensor:
    """KL(teacher || student) in nats, mean over the (N, V) positions given; gradients reach the student only.

    With a ``floor`` above 0: the mean over prompts of ``log(KL + floor)``, where ``prompt`` (N,) says whose position
    each is. Then twice as good counts as much for a prompt of little divergence as for one of much.
    """
    teacher = teacher_logits.detach().float().log_softmax(-1)
    student = student_logits.float().log_softmax(-1)
    if not floor:
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    each = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    sums = each.new_zeros(int(prompt.max()) + 1).index_add(0, prompt, each)
    counts = torch.bincount(prompt, minlength=len(sums))
    return (sums[counts > 0] / counts[counts > 0] + floor).log().mean()


def soft_keep(scores: Tensor, valid: Tensor, kept: Tensor, temperature: float, floor: float = 1e-3) -> Tensor:
    """How much of each token stays under a soft cut: (B, T) in [floor, 1], differentiable with respect to scores.

    ``kept`` (B,) of the valid tokens are above the cut. A sigmoid of the standardised score's distance to the cut.
    Tokens outside ``valid`` (protected) stay in full. The floor tames the gradient of the logarithm that turns this
    into an attention bias.
    """
    standard = standardised(scores, valid)
    # One half at the last token that stays, more above it and less below.
    keep = torch.sigmoid((standard - _threshold(standard, valid, kept)) / temperature)
    return torch.where(valid, floor + (1 - floor) * keep, torch.ones_like(keep))


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``, both (B, T)."""
    return soft + (hard - soft).detach()


@torch.no_grad()
def _threshold(standard: Tensor, valid: Tensor, kept: Tensor) -> Tensor:
    """(B, 1) standardised score of the last token above the cut; clear of the highest where none is."""
    descending = standard.masked_fill(~valid, -torch.inf).sort(-1, descending=True).values
    last = descending.gather(-1, (kept[:, None] - 1).clamp(min=0))
    return torch.where(kept[:, None] > 0, last, last + 1)


def _ranks(labels: Tensor, valid: Tensor) -> Tensor:
    """(B, T) rank of each token among the valid ones, 0 for the highest label; ties go to the later token."""
    # Labels 3, 1, 3: the order of the columns is 2, 0, 1 (the later of two equals first), the ranks are 1, 2, 0.
    order = labels.masked_fill(~valid, -torch.inf).flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = labels.shape[-1] - 1 - order
    place = torch.arange(labels.shape[-1], device=labels.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


class _PairwiseRanking(torch.autograd.Function):
    """Loss and gradient in one sweep over blocks of rows, so that no T x T matrix is kept for the backward pass."""

    @staticmethod
    def forward(ctx, scores, labels, upper, lower):
        # In the order of the labels each pair's sign is known: the earlier token is the better one.
        order = labels.argsort(dim=-1, descending=True, stable=True)
        s, y, up, low = (x.gather(-1, order) for x in (scores, labels, upper, lower))
        sorted_gradient = torch.zeros_like(s)
        total = s.new_zeros(len(s), dtype=torch.float64)
        pairs = s.new_zeros(len(s), dtype=torch.float64)
        for row in range(len(s)):
            better = up[row].nonzero().flatten()
            worse = low[row].nonzero().flatten()
            for start in range(0, len(better), _ROWS_AT_ONCE):
                i = better[start : start + _ROWS_AT_ONCE]
                # Nothing before the block's first token can be the worse one of its pairs.
                j = worse[torch.searchsorted(worse, i[:1]).item() :]
                if len(j) == 0:
                    continue
                # (i, j) blocks of at most `_ROWS_AT_ONCE` x T; equal labels have weight 0.
                weight = (y[row, i, None] > y[row, None, j]) * (up[row, i, None] * low[row, None, j])
                margin = s[row, i, None] - s[row, None, j]
                pairs[row] += weight.sum(dtype=torch.float64)
                total[row] += (F.softplus(-margin) * weight).sum(dtype=torch.float64)
                # d softplus(-m) / dm = -sigmoid(-m): a step down the gradient lifts the better token, lowers the worse.
                slope = torch.sigmoid(-margin).mul_(weight)
                sorted_gradient[row].index_add_(0, i, -slope.sum(1))
                sorted_gradient[row].index_add_(0, j, slope.sum(0))
        pairs = pairs.clamp(min=torch.finfo(torch.float64).tiny)
        gradient = torch.zeros_like(s).scatter_(-1, order, sorted_gradient)
        ctx.save_for_backward((gradient / pairs[:, None] / len(s)).to(scores.dtype))
        return (total / pairs).mean().to(scores.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None
