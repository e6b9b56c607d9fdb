"""The losses against the formulas they implement, values and gradients, with what must not take part."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtp_lib.training import losses


def naive_ranking(scores, labels, valid, upper=None, lower=None):
    """The formula, pair by pair."""
    rows = []
    for b in range(len(scores)):
        total, weight = scores.new_zeros(()), 0.0
        for i in range(scores.shape[1]):
            for j in range(scores.shape[1]):
                if not (valid[b, i] and valid[b, j] and labels[b, i] > labels[b, j]):
                    continue
                w = 1.0 if upper is None else float(upper[b, i] * lower[b, j])
                total = total + w * torch.log1p(torch.exp(-(scores[b, i] - scores[b, j])))
                weight += w
        rows.append(total / weight if weight else total)
    return torch.stack(rows).mean()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 14), weighted=st.booleans())
def test_ranking_and_its_gradient_equal_the_pair_by_pair_formula(seed, tokens, weighted):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, tokens, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 4, (2, tokens), generator=generator).double()
    valid = torch.rand(2, tokens, generator=generator) > 0.3
    weights = losses.cut_weights(labels, valid, valid.sum(-1) * 6 // 10, width=0.3) if weighted else (None, None)
    expected = naive_ranking(scores, labels, valid, *weights)
    measured = losses.pairwise_ranking(scores, labels, valid, *weights)
    torch.testing.assert_close(measured, expected)
    if expected.requires_grad:
        torch.testing.assert_close(
            torch.autograd.grad(3 * measured, scores)[0], torch.autograd.grad(3 * expected, scores)[0]
        )


def test_ranking_is_the_same_in_blocks_as_in_one_piece(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 700, generator=generator, dtype=torch.float64).requires_grad_()
    labels, valid = torch.rand(1, 700, generator=generator, dtype=torch.float64), torch.ones(1, 700, dtype=torch.bool)
    in_blocks = losses.pairwise_ranking(scores, labels, valid)
    monkeypatch.setattr(losses, "_ROWS_AT_ONCE", 10_000)
    whole = losses.pairwise_ranking(scores, labels, valid)
    torch.testing.assert_close(in_blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(in_blocks, scores)[0], torch.autograd.grad(whole, scores)[0])


def test_ranking_is_log_two_without_information_and_falls_with_the_right_order():
    labels, valid = torch.arange(20.0)[None], torch.ones(1, 20, dtype=torch.bool)
    assert losses.pairwise_ranking(torch.zeros(1, 20), labels, valid).item() == pytest.approx(math.log(2))
    assert losses.pairwise_ranking(10 * labels, labels, valid) < 1e-4
    assert losses.pairwise_ranking(-labels, labels, valid) > 5


def test_padding_and_protected_tokens_get_no_gradient_and_change_nothing():
    """An earlier reproduction gave padding labels, scores and losses."""
    generator = torch.Generator().manual_seed(1)
    valid = torch.zeros(1, 40, dtype=torch.bool)
    valid[:, 7:] = True
    counted = losses.scorable(valid, sink_tokens=4, local_ratio=0.1, min_local_tokens=5)
    assert counted[0].nonzero().flatten().tolist() == list(range(11, 35))
    labels = torch.rand(1, 40, generator=generator)
    scores = torch.randn(1, 40, generator=generator)
    other = torch.where(counted, scores, torch.full_like(scores, 1e4))
    other_labels = torch.where(counted, labels, torch.full_like(labels, 7.0))
    for loss in (
        losses.pairwise_ranking,
        losses.masked_mse,
        lambda s, y, v: losses.dropped_saliency(s, y, v, torch.tensor([19])),
        lambda s, y, v: losses.masked_mse(s, losses.log_saliency(y, v), v),
    ):
        first, second = scores.clone().requires_grad_(), other.clone().requires_grad_()
        value = loss(first, labels, counted)
        torch.testing.assert_close(value, loss(second, other_labels, counted))
        gradient = torch.autograd.grad(value, first)[0]
        assert gradient[~counted].abs().max() == 0
        assert gradient[counted].abs().max() > 0


def test_a_row_without_scorable_tokens_costs_nothing_and_gives_no_nan():
    scores = torch.randn(1, 10, requires_grad=True)
    valid = torch.zeros(1, 10, dtype=torch.bool)
    labels = torch.rand(1, 10)
    for value in (
        losses.pairwise_ranking(scores, labels, valid),
        losses.masked_mse(scores, labels, valid),
        losses.dropped_saliency(scores, labels, valid, torch.tensor([0])),
    ):
        assert value.item() == 0
        assert torch.autograd.grad(value, scores)[0].abs().max() == 0


def test_cut_weights_pair_only_tokens_on_opposite_sides_of_the_cut():
    labels = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0]])
    upper, lower = losses.cut_weights(labels, torch.ones(1, 5, dtype=torch.bool), torch.tensor([3]))
    assert upper[0].tolist() == [1, 0, 1, 0, 1]
    assert lower[0].tolist() == [0, 1, 0, 1, 0]
    near_upper, near_lower = losses.cut_weights(labels, torch.ones(1, 5, dtype=torch.bool), torch.tensor([3]), 0.2)
    assert near_upper[0, 4] > near_upper[0, 2] > near_upper[0, 0] > 0
    assert near_lower[0, 3] > near_lower[0, 1] > 0


def test_dropped_saliency_is_the_share_below_the_cut_when_the_step_is_sharp():
    saliency = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    scores, valid = torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
    soft = losses.dropped_saliency(scores, saliency, valid, torch.tensor([2]), temperature=1e-3)
    # The last kept token sits on the threshold and counts half.
    assert soft.item() == pytest.approx((1 + 3 + 4 / 2) / 10)


def test_log_saliency_does_not_depend_on_the_scale_of_the_saliency():
    saliency, valid = torch.rand(2, 30, dtype=torch.float64) ** 4, torch.ones(2, 30, dtype=torch.bool)
    torch.testing.assert_close(losses.log_saliency(saliency, valid), losses.log_saliency(1e-7 * saliency, valid))


def test_distillation_is_zero_for_equal_logits_and_positive_elsewhere():
    generator = torch.Generator().manual_seed(2)
    teacher, student = (torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    assert losses.distillation(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-6)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert losses.distillation(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_with_a_floor_each_prompt_counts_by_the_logarithm_of_its_divergence():
    generator = torch.Generator().manual_seed(2)
    teacher, student = (torch.randn(6, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    prompt = torch.tensor([0, 0, 2, 2, 2, 3])  # prompt 1 has no position
    found = losses.distillation(student, teacher, prompt, floor=0.01).item()
    parts = [losses.distillation(student[prompt == n], teacher[prompt == n]).item() for n in (0, 2, 3)]
    assert found == pytest.approx(sum(math.log(part + 0.01) for part in parts) / 3, rel=1e-5)


def test_highest_takes_so_many_of_the_valid_tokens_and_the_later_of_equal_scores():
    scores = torch.tensor([[9.0, 1.0, 5.0, 5.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
    chosen = losses.highest(scores, valid, torch.tensor([2, 2]))
    assert chosen.tolist() == [[False, False, True, True, False], [False, False, True, True, False]]
    assert not losses.highest(scores, torch.zeros_like(valid), torch.tensor([0, 0])).any()


def test_soft_keep_leaves_protected_tokens_whole_and_reaches_the_scores():
    scores = torch.randn(1, 50, requires_grad=True)
    valid = torch.ones(1, 50, dtype=torch.bool)
    valid[:, :4] = valid[:, -10:] = False
    keep = losses.soft_keep(scores, valid, torch.tensor([18]), temperature=0.1)
    assert (keep[~valid] == 1).all()
    assert (keep[valid] >= 0.5).sum() == 18
    assert keep.min() >= 1e-3
    hard = (keep > 0.5).float()
    through = losses.straight_through(keep, hard)
    torch.testing.assert_close(through, hard)
    assert torch.autograd.grad(through.log1p().sum(), scores)[0][valid].abs().sum() > 0


def test_a_cut_that_leaves_no_unprotected_token_leaves_none():
    """The highest of them used to stay, on the threshold."""
    scores, valid = torch.randn(2, 9), torch.ones(2, 9, dtype=torch.bool)
    keep = losses.soft_keep(scores, valid, torch.tensor([0, 1]), temperature=0.1)
    assert (keep >= 0.5).sum(-1).tolist() == [0, 1]


def test_ranking_is_exact_at_8192_tokens_within_300_mb():
    resource = pytest.importorskip("resource")
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(1, 8192, generator=generator).requires_grad_()
    labels, valid = torch.rand(1, 8192, generator=generator), torch.ones(1, 8192, dtype=torch.bool)
    losses.pairwise_ranking(scores[:, :64], labels[:, :64], valid[:, :64]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = losses.pairwise_ranking(scores, labels, valid)
    loss.backward()
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 300
    sample = torch.randperm(8192, generator=generator)[:2000]
    s, y = scores.detach()[0, sample], labels[0, sample]
    better = y[:, None] > y[None]
    estimate = torch.nn.functional.softplus(-(s[:, None] - s[None]))[better].mean()
    assert loss.item() == pytest.approx(estimate.item(), rel=0.03)
