"""The blend: parts made comparable, attention read from the cache, and the mix kept with the pruners."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdtp_lib import PruningConfig, TokenPruners, methods, token_pruning
from sdtp_lib.architectures.attention_readings import attention_of_earlier_layers
from sdtp_lib.pruning.stage import earlier_layers
from sdtp_lib.scorers.blend import Blend, average_of_neighbours, standardised
from sdtp_lib.scorers.stage_network import StageInputs

CONFIG = PruningConfig(layers=(2, 4), keep_ratio=0.5, min_local_tokens=4, sink_tokens=2)
MIX = {"learned": 0.7, "attention": 1.0, "recency": 0.3, "smoothing": 5, "window": 4, "kernel": 3}


class _Reads:
    """A scorer that keeps what `attention_just_paid` says at each stage."""

    def __init__(self, window: int) -> None:
        self.window, self.seen, self.scored = window, {}, {}

    def __call__(self, stage):
        self.seen[stage.layer_index] = stage.attention_just_paid(self.window)
        self.scored[stage.layer_index] = stage.positions
        return stage.positions.float()


@pytest.mark.parametrize(("family", "layer"), [("llama", 1), ("qwen3", 1), ("mistral", 1), ("phi3", 2), ("bloom", 2)])
def test_what_was_just_paid_is_the_attention_that_the_model_reports(tiny_model, family, layer):
    # Families with fused projections have no cheap queries: theirs is the stage's own layer.
    model, prompt = tiny_model(family, attn_implementation="eager"), torch.arange(3, 63)[None]
    with torch.no_grad():
        reported = model(input_ids=prompt, output_attentions=True).attentions[layer]
    scorer = _Reads(4)
    with torch.no_grad(), token_pruning(model, CONFIG, scorer):
        model(input_ids=prompt)
    torch.testing.assert_close(scorer.seen[2], reported[:, :, -4:], rtol=1e-4, atol=1e-6)


def test_after_a_cut_and_under_padding_each_row_reads_its_own_attention(tiny_model):
    model = tiny_model()
    rows = [torch.arange(3, 63), torch.arange(20, 60)]
    batch, mask = torch.zeros(2, 60, dtype=torch.long), torch.zeros(2, 60, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, -len(row) :], mask[index, -len(row) :] = row, 1
    together = _Reads(4)
    with torch.no_grad(), token_pruning(model, CONFIG, together):
        model(input_ids=batch, attention_mask=mask)
    for index, row in enumerate(rows):
        alone = _Reads(4)
        with torch.no_grad(), token_pruning(model, CONFIG, alone):
            model(input_ids=row[None])
        kept = alone.seen[4].shape[-1]
        assert alone.scored[4][0].tolist() == together.scored[4][index, -kept:].tolist()
        torch.testing.assert_close(together.seen[4][index, ..., -kept:], alone.seen[4][0], rtol=1e-4, atol=1e-6)


class _Masses:
    """A scorer that keeps every head's attention in the layers before each stage."""

    def __init__(self, back) -> None:
        self.back, self.seen = back, {}

    def __call__(self, stage):
        self.seen[stage.layer_index] = stage.attention_mass(self.back[stage.layer_index], 4)
        return stage.positions.float()


# Layer 1 sees all tokens, the others the last 12: stage 2 is right behind it, stage 4 is not.
WINDOWS = {"sliding_window": 12, "layer_types": [*["sliding_attention", "full_attention"], *["sliding_attention"] * 4]}


@pytest.mark.parametrize(
    ("family", "more"),
    [(family, {}) for family in ("llama", "qwen3", "smollm3", "phi3", "gpt2", "bloom", "mistral")]
    + [(family, WINDOWS) for family in ("gemma3_text", "gemma2", "gpt_oss")]
    + [("qwen3", {**WINDOWS, "use_sliding_window": True}), ("mistral", {"sliding_window": 12})],
)
def test_what_training_reads_in_one_forward_is_what_a_prefill_shows(tiny_model, family, more):
    model = tiny_model(family, **more)
    back = earlier_layers(CONFIG.layers)
    rows = [torch.arange(3, 63), torch.arange(20, 60)]
    response = torch.arange(70, 75)
    whole, mask = torch.zeros(2, 65, dtype=torch.long), torch.zeros(2, 65, dtype=torch.long)
    for index, row in enumerate(rows):
        whole[index, -len(row) - 5 :], mask[index, -len(row) - 5 :] = torch.cat([row, response]), 1
    prompt = mask.bool() & (torch.arange(65) < 60)
    with torch.no_grad(), attention_of_earlier_layers(model, back, 4, lambda _layer: prompt) as paid:
        # BLOOM counts positions from the mask by itself.
        places = {} if family == "bloom" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        model(input_ids=whole, attention_mask=mask, **places)
    for index, row in enumerate(rows):
        scorer = _Masses(back)
        with torch.no_grad(), token_pruning(model, CONFIG.replace(keep_ratio=1.0), scorer) as trace:
            model(input_ids=row[None])
            assert sorted(trace.scores) == sorted(CONFIG.layers)  # where nothing is dropped, reading is what scores
        for stage in CONFIG.layers:
            heads = model.config.num_attention_heads
            assert scorer.seen[stage].shape == (1, len(row), 3 * heads)
            torch.testing.assert_close(
                paid[stage][index, 60 - len(row) : 60], scorer.seen[stage][0], rtol=1e-3, atol=1e-5
            )
            assert paid[stage][index, 60:].abs().max() == 0
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize(("family", "more"), [("gemma3_text", {}), ("qwen3", {"use_sliding_window": True})])
def test_where_layers_see_a_window_the_last_that_saw_all_tells_of_tokens_far_back(tiny_model, family, more):
    """Stages 4, 7, 10, 13 and 16 of Gemma 3 all have windows: no input of a pruner knew of what came before them."""
    model, prompt = tiny_model(family, attn_implementation="eager", **WINDOWS, **more), torch.arange(3, 63)[None]
    with torch.no_grad():
        reported = model(input_ids=prompt, output_attentions=True).attentions[1][0, :, -4:]
    masses = _Masses(earlier_layers(CONFIG.layers))
    with torch.no_grad(), token_pruning(model, CONFIG, masses) as trace:
        model(input_ids=prompt)
    far, *near = masses.seen[2][0].chunk(3, dim=-1)
    torch.testing.assert_close(far, reported.sum(dim=1).T, rtol=1e-4, atol=1e-6)
    left = trace.scored_positions[4][0]
    assert len(left) == 30 and left[9] < 60 - 12 - 4, "ten tokens beyond every window"
    far, *near = masses.seen[4][0].chunk(3, dim=-1)
    assert all(each[:10].abs().max() == 0 for each in near), "layers that see the last 12 tokens"
    shares = reported[..., left]
    torch.testing.assert_close(far, (shares / shares.sum(-1, keepdim=True)).sum(dim=1).T, rtol=1e-4, atol=1e-6)


def test_under_padding_and_two_cuts_each_row_reads_its_own_far_attention(tiny_model):
    model, config = tiny_model("gemma3_text", **WINDOWS), CONFIG.replace(layers=(2, 3, 5))
    back = earlier_layers(config.layers)
    rows = [torch.arange(3, 63), torch.arange(20, 60)]
    batch, mask = torch.zeros(2, 60, dtype=torch.long), torch.zeros(2, 60, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, -len(row) :], mask[index, -len(row) :] = row, 1
    together = _Masses(back)
    with torch.no_grad(), token_pruning(model, config, together):
        model(input_ids=batch, attention_mask=mask)
    for index, row in enumerate(rows):
        alone = _Masses(back)
        with torch.no_grad(), token_pruning(model, config, alone):
            model(input_ids=row[None])
        kept = alone.seen[5].shape[1]
        torch.testing.assert_close(together.seen[5][index, -kept:], alone.seen[5][0], rtol=1e-4, atol=1e-6)
        assert together.seen[5][index, :-kept].abs().sum() == 0


def test_a_second_pass_without_stages_runs_where_layers_have_windows(tiny_model):
    """`compare` on Gemma 3 ended in an IndexError: the pass that runs on the chosen tokens has no stage."""
    model = tiny_model("gemma3_text", **WINDOWS)
    method = methods.get("specprefill", keep=0.3, chunk=16)
    with torch.no_grad(), token_pruning(model, method) as trace:
        model(input_ids=torch.arange(3, 103)[None], logits_to_keep=1)
    assert 0 < trace.tokens_per_row[-1, 0] < 100


def test_reading_it_projects_no_key_twice(tiny_model):
    model, calls = tiny_model(), []
    handles = [layer.self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
    # Without `verify`, which runs the layers itself where this release has not swept this transformers.
    with torch.no_grad(), token_pruning(model, CONFIG, _Reads(4), verify="never"):
        model(input_ids=torch.arange(3, 63)[None])
    for handle in handles:
        handle.remove()
    assert len(calls) == len(model.model.layers)


def test_without_a_cache_it_falls_back_to_the_stage_s_own_layer(tiny_model):
    model, prompt = tiny_model(attn_implementation="eager"), torch.arange(3, 63)[None]
    scorer = _Reads(4)
    with torch.no_grad(), token_pruning(model, CONFIG, scorer):
        model(input_ids=prompt, use_cache=False)
    with torch.no_grad():
        reported = model(input_ids=prompt, output_attentions=True).attentions[2]
    torch.testing.assert_close(scorer.seen[2], reported[:, :, -4:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("valid", [[True, True, True], [False, True, False], [False] * 3])
def test_equal_scores_and_a_token_alone_have_a_gradient_that_does_not_explode(valid):
    """A stage with one token open to its cut gave NaN weights in a distillation."""
    scores = torch.ones(1, 3, requires_grad=True)
    made = standardised(scores, torch.tensor([valid]))
    made.sum().backward(retain_graph=True)
    assert made.tolist() == [[0.0] * 3] and scores.grad.tolist() == [[0.0] * 3]
    (made * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert scores.grad.abs().max() <= 2


def test_parts_are_standardised_and_smoothed_over_kept_tokens_only():
    scores = torch.tensor([[999.0, 1.0, 2.0, 3.0], [4.0, 8.0, 0.0, 4.0]])
    valid = torch.tensor([[False, True, True, True], [True] * 4])
    made = standardised(scores, valid)
    assert made[0, 0] == 0
    torch.testing.assert_close(made[0, 1:], torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5)
    torch.testing.assert_close(made[1].square().mean(), torch.tensor(1.0))
    smooth = average_of_neighbours(scores, valid, 3)
    torch.testing.assert_close(smooth[0, 1:], torch.tensor([1.5, 2.0, 2.5]))
    torch.testing.assert_close(smooth[1], torch.tensor([6.0, 4.0, 4.0, 2.0]))


def test_the_blend_travels_with_the_pruners_and_only_changes_what_is_chosen(tiny_model, tmp_path):
    model, prompt = tiny_model(), torch.arange(3, 63)[None]
    torch.manual_seed(0)
    plain = TokenPruners.for_model(model, CONFIG.layers)
    mixed = TokenPruners.for_model(model, CONFIG.layers, blend=MIX)
    mixed.load_state_dict(plain.state_dict())
    mixed.save_pretrained(str(tmp_path))
    again = TokenPruners.from_pretrained(str(tmp_path))
    assert again.blend == Blend(**MIX)

    def scores(pruners):
        with torch.no_grad(), token_pruning(model, CONFIG, pruners) as trace:
            model(input_ids=prompt)
        return trace.scores

    torch.testing.assert_close(scores(again)[2], scores(mixed)[2], rtol=0, atol=0)
    assert not torch.allclose(scores(mixed)[2], scores(plain)[2])
    hidden, positions = torch.randn(1, 60, model.config.hidden_size), torch.arange(60)[None]
    arguments = StageInputs(hidden, positions, torch.ones(1, 60, dtype=torch.bool), torch.tensor([60]))
    torch.testing.assert_close(mixed.score(2, arguments), plain.score(2, arguments))
    extra = mixed.flops_per_token() - plain.flops_per_token()
    assert extra == 2 * MIX["window"] * model.config.hidden_size


def test_recency_alone_as_a_blend_is_recency(tiny_model):
    model = tiny_model()
    pruners = TokenPruners.for_model(model, CONFIG.layers, blend={"learned": 0.0, "recency": 1.0})
    with torch.no_grad(), token_pruning(model, CONFIG, pruners) as trace:
        model(input_ids=torch.arange(3, 63)[None])
    assert trace.kept_positions[2][0].tolist() == [0, 1, *range(32, 60)]


def test_below_its_floor_the_learned_part_orders_nothing():
    stage = SimpleNamespace(padding_mask=None, positions=torch.arange(5)[None])
    learned = torch.tensor([[-3.0, -1.0, -2.0, 0.0, 6.0]])  # mean 0: only the last stands out
    mixed = Blend(learned=1.0, floor=0.0)(learned, stage)
    assert mixed[0, :4].tolist() == [0.0] * 4 and mixed[0, 4] > 1
    order = Blend(learned=1.0, recency=0.1, floor=0.0)(learned, stage)[0].argsort().tolist()
    assert order == [0, 1, 2, 3, 4], "what does not stand out is ordered by recency"


@pytest.mark.parametrize(("field", "value"), [("smoothing", 4), ("kernel", 0), ("window", 0), ("learned", 0.0)])
def test_a_blend_that_makes_no_sense_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        Blend(**{field: value})
