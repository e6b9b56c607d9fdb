"""A training step: what its losses see, what they reach, and that simulated pruning keeps what the engine keeps."""

from __future__ import annotations

import pytest
import torch

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.pruning.stage import QUERY_TOKENS
from sdtp_lib.scorers.stage_network import StageInputs
from sdtp_lib.scorers.token_pruners import FEATURES, TokenPruners
from sdtp_lib.training import losses
from sdtp_lib.training.config import TrainingConfig
from sdtp_lib.training.saliency import compute_saliency
from sdtp_lib.training.simulation import KeptTokens, share_of_kept, simulated_pruning
from sdtp_lib.training.step import LEAST_EVIDENCE, Collator, PrunerLoss
from tests.training.made_up import LAYERS, QUICK, samples


def batch_of(labelled, rows):
    return Collator(LAYERS)([labelled[i] for i in rows])


@pytest.mark.parametrize("staged", [True, False])
def test_a_stage_learns_only_about_tokens_that_the_one_before_leaves(tiny_model, labelled, staged):
    """Labels of dropped tokens at the second stage change nothing if training is staged, and much if it is not."""
    model = tiny_model()
    config = QUICK.replace(staged=staged, keep_ratios=(0.5, 0.5), sink_tokens=2)
    pruners = TokenPruners.for_model(model, LAYERS).eval()
    step = PrunerLoss(pruners, model, LAYERS, config)
    batch = batch_of(labelled, [0])
    prompt = batch["prompt_mask"]
    scores = pruners.score(
        LAYERS[0], StageInputs(batch["hidden"][:, 0], prompt.long().cumsum(-1) - 1, prompt, prompt.sum(-1))
    ).detach()
    counted = losses.scorable(prompt, 2, config.local_ratio, 4)
    tokens = int(prompt.sum())
    kept = max(0, budget.share_of(tokens, 0.5) - budget.protected_count(tokens, config))
    dropped = counted & ~losses.highest(scores, counted, torch.tensor([kept]))
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][:, 1][dropped] *= 50
    changed = {name: not torch.equal(value, step(**other)[name]) for name, value in step(**batch).items()}
    assert changed == dict.fromkeys(changed, not staged)


@pytest.mark.parametrize(("ratio", "last"), [(0.9, 394), (0.8, 136), (0.7, 40)])
def test_staged_training_leaves_as_many_tokens_as_a_prefill(ratio, last):
    """Training took the ratio of the unprotected tokens: 439, 174 and 66 were left of 1,024 after nine stages."""
    layers, config = tuple(range(4, 30, 3)), TrainingConfig()
    tokens = KeptTokens(TokenPruners(8, layers), torch.ones(1, 1024, dtype=torch.bool))
    expected = budget.tokens_per_layer(PruningConfig(layers, ratio), 30, 1024)
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        scores = torch.rand(1, 1024, generator=generator)
        open_to_cut = tokens.open_to_cut(config)
        kept = tokens.kept(ratio, open_to_cut)
        tokens.mask = tokens.mask & ~(open_to_cut & ~losses.highest(scores, open_to_cut, kept))
        assert int(tokens.mask.sum()) == expected[layer]
    assert int(tokens.mask.sum()) == last


def test_attention_stored_of_the_whole_prompt_is_shared_among_the_kept():
    mass = torch.rand(1, 10, 2, generator=torch.Generator().manual_seed(0))
    mass = mass * (QUERY_TOKENS / mass.sum(dim=1, keepdim=True))
    left = torch.arange(10)[None] < 6
    shared = share_of_kept(mass, left, mass.sum(dim=1))
    assert torch.allclose(shared.sum(dim=1), torch.full((1, 2), float(QUERY_TOKENS)))
    assert torch.equal(shared[0, 6:], torch.zeros(4, 2))
    torch.testing.assert_close(shared[0, 0] / shared[0, 1], mass[0, 0] / mass[0, 1])


def test_stored_hidden_states_and_a_fresh_forward_give_the_same_losses(tiny_model, labelled):
    torch.manual_seed(0)
    loss = PrunerLoss(TokenPruners(32, LAYERS), tiny_model(), LAYERS, QUICK).eval()
    batch = batch_of(labelled, [0, 3])
    stored = loss(**batch)["loss"]
    batch.pop("hidden")
    torch.testing.assert_close(loss(**batch)["loss"], stored, rtol=2e-3, atol=2e-3)


def test_labels_sit_at_their_own_tokens_in_a_padded_batch(labelled):
    """An earlier reproduction let padding have labels, and labels slide to other tokens."""
    batch = batch_of(labelled, [0, 7])
    for index, row in enumerate((0, 7)):
        prompt = batch["prompt_mask"][index]
        expected = labelled[row]["input_ids"][: labelled[row]["prompt_length"]]
        assert batch["input_ids"][index][prompt].tolist() == expected
        torch.testing.assert_close(batch["labels"][index, 1][prompt], torch.tensor(labelled[row]["layer_3"]))
        assert (batch["labels"][index][:, ~prompt] == 0).all()


def test_evidence_is_the_label_of_every_stage_and_a_token_without_any_has_a_little(labelled):
    known = {**labelled[0], "evidence": [0.0, 1.0] * 100}
    known["evidence"] = known["evidence"][: known["prompt_length"]]
    known |= dict.fromkeys((f"layer_{layer}" for layer in LAYERS), None)
    batch = Collator(LAYERS)([known, {**labelled[7], "evidence": None}])
    prompt = batch["prompt_mask"][0]
    for stage in range(len(LAYERS)):
        expected = torch.tensor(known["evidence"]).clamp(min=LEAST_EVIDENCE)
        torch.testing.assert_close(batch["labels"][0, stage][prompt], expected)
    other = batch["labels"][1, 1][batch["prompt_mask"][1]]
    torch.testing.assert_close(other, torch.tensor(labelled[7]["layer_3"]))


def test_inputs_are_hidden_in_training_steps_alone(tiny_model, labelled):
    model, batch = tiny_model(), batch_of(labelled, range(4))
    pruners = TokenPruners.for_model(model, LAYERS)
    fixed = QUICK.replace(keep_ratios=(0.8, 0.8), eval_ratio=0.8)
    with_all, with_half = (
        PrunerLoss(pruners, model, LAYERS, fixed.replace(input_dropout=share)) for share in (0.0, 0.5)
    )
    full = with_all.eval()(**batch)["loss"]
    torch.testing.assert_close(with_half.eval()(**batch)["loss"], full)
    assert not torch.isclose(with_half.train()(**batch)["loss"], full)


def test_the_loss_of_a_row_does_not_change_with_its_padding(tiny_model, labelled):
    torch.manual_seed(0)
    loss = PrunerLoss(TokenPruners(32, LAYERS, features=("hidden", "distance", "query")), tiny_model(), LAYERS, QUICK)
    loss.eval()
    apart = (loss(**batch_of(labelled, [0]))["rank_loss"] + loss(**batch_of(labelled, [7]))["rank_loss"]) / 2
    together = loss(**batch_of(labelled, [0, 7]))["rank_loss"]
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("blend", [None, {"learned": 3.0, "attention": 1.0, "recency": 0.5, "smoothing": 3}])
@pytest.mark.parametrize("features", [("hidden",), FEATURES])
@pytest.mark.parametrize("straight_through", [True, False])
def test_the_pruned_models_loss_reaches_every_stage_of_the_pruners_and_no_weight(
    tiny_model, labelled, straight_through, features, blend
):
    """An earlier reproduction multiplied hidden states by the mask; here keys are masked in attention.

    Where a stage reads attention, the cut of the one before came from a hook without a graph, so that the last stage
    alone learned.
    """
    model = tiny_model()
    config = QUICK.replace(
        mse_weight=0.0, rank_weight=0.0, distill_weight=1.0, lm_weight=1.0, straight_through=straight_through
    )
    torch.manual_seed(0)
    pruners = TokenPruners(32, LAYERS, features=features, attention_heads=4, blend=blend)
    batch = batch_of(labelled, [0, 5])
    del batch["hidden"]
    outputs = PrunerLoss(pruners, model, LAYERS, config)(**batch)
    outputs["loss"].backward()
    assert set(outputs) == {"loss", "lm_loss", "distill_loss"}
    for layer in LAYERS:
        gradient = pruners.stages[str(layer)].down.weight.grad
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


# Layer 0 sees all tokens, the others the last 12.
_WINDOWS = {"sliding_window": 12, "layer_types": ["full_attention", *["sliding_attention"] * 5]}


@pytest.mark.parametrize(("family", "more"), [("llama", {}), ("gemma3_text", _WINDOWS)])
@pytest.mark.parametrize("features", [("hidden", "distance"), ("hidden", "distance", "query", "attention", "memory")])
@pytest.mark.parametrize(
    "blend", [None, {"learned": 2.0, "attention": 1.0, "recency": 0.2, "floor": 0, "smoothing": 3}]
)
def test_simulated_pruning_keeps_what_the_engine_keeps_and_predicts_what_it_predicts(
    tiny_model, features, blend, family, more
):
    model = tiny_model(family, dtype=torch.float64, **more)
    torch.manual_seed(3)
    passage = 5 if "query" in features else 0
    pruners = TokenPruners(32, LAYERS, features=features, attention_heads=4, passage_tokens=passage, blend=blend)
    ids = torch.tensor([samples(1, 60)[0]["prompt_ids"]])
    config = TrainingConfig(min_local_tokens=4, keep_floor=1e-6)
    with token_pruning(model, PruningConfig(LAYERS, 0.7, min_local_tokens=4), pruners) as trace, torch.no_grad():
        pruned = model(ids).logits[:, -1]
    with simulated_pruning(model, pruners, torch.ones_like(ids, dtype=torch.bool), 0.7, config) as keep:
        simulated = model(ids, use_cache=False).logits[:, -1]
    visible = torch.ones(ids.shape[1], dtype=torch.bool)
    for layer in LAYERS:
        visible &= keep[layer][0] > 0.5
        assert visible.nonzero().flatten().tolist() == trace.kept_positions[layer][0].tolist()
    torch.testing.assert_close(simulated, pruned, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_layers_that_backward_would_run_again_without_the_simulation_are_refused(tiny_model):
    model, pruners = tiny_model(), TokenPruners(32, LAYERS)
    ids = torch.tensor([samples(1, 60)[0]["prompt_ids"]])
    model.gradient_checkpointing_enable()
    with (
        pytest.raises(ValueError, match=r"LlamaForCausalLM is in training mode with .*: call model.eval\(\)"),
        simulated_pruning(model.train(), pruners, torch.ones_like(ids, dtype=torch.bool), 0.7, TrainingConfig()),
    ):
        pytest.fail("the forward must not begin")
    with simulated_pruning(model.eval(), pruners, torch.ones_like(ids, dtype=torch.bool), 0.7, TrainingConfig()):
        logits = model(ids, use_cache=False).logits
    logits.sum().backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in pruners.parameters())


@pytest.mark.parametrize(("keep_floor", "even"), [(0.044, False), (0.6, False), (1e-3, True)])
def test_a_simulated_cut_keeps_as_many_as_the_engine_whatever_the_floor_and_where_scores_are_equal(
    tiny_model, keep_floor, even
):
    """A floor of 0.044 took one more by a rounding, one of 0.6 hid no cut from later stages, and equal scores all
    stayed."""
    model = tiny_model()
    torch.manual_seed(3)
    pruners = TokenPruners(32, LAYERS)
    if even:
        for network in pruners.stages.values():
            network.out.weight.data.zero_()
    ids = torch.tensor([samples(1, 60)[0]["prompt_ids"]])
    with token_pruning(model, PruningConfig(LAYERS, 0.7, min_local_tokens=4), pruners) as trace, torch.no_grad():
        model(ids)
    config = TrainingConfig(min_local_tokens=4, keep_floor=keep_floor)
    with simulated_pruning(model, pruners, torch.ones_like(ids, dtype=torch.bool), 0.7, config) as keep:
        model(ids, use_cache=False)
    visible = torch.ones(ids.shape[1], dtype=torch.bool)
    for layer in LAYERS:
        visible &= keep[layer][0] > (1 + keep_floor) / 2
        counts = int(visible.sum()), len(trace.kept_positions[layer][0])
        assert counts[0] == counts[1]
        if keep_floor < 0.5:
            assert visible.nonzero().flatten().tolist() == trace.kept_positions[layer][0].tolist()


@pytest.mark.parametrize("ratio", [0.7, 0.3])
def test_what_a_sample_protects_no_stage_of_training_drops_and_the_budget_counts_it(tiny_model, ratio):
    """``protect`` reached the engine only: training dropped what inference keeps, and ranked it."""
    model = tiny_model(dtype=torch.float64)
    torch.manual_seed(3)
    pruners = TokenPruners(32, LAYERS, features=("hidden", "distance"))
    ids = torch.tensor([samples(1, 60)[0]["prompt_ids"]])
    protect = torch.zeros_like(ids, dtype=torch.bool)
    protect[0, 10:30] = True  # at 0.3 more than the budget would keep
    config = TrainingConfig(min_local_tokens=4, keep_floor=1e-6)
    cut = PruningConfig(LAYERS, ratio, min_local_tokens=4)
    with token_pruning(model, cut, pruners, protect=protect) as trace, torch.no_grad():
        model(ids)
    whole = torch.ones_like(ids, dtype=torch.bool)
    with simulated_pruning(model, pruners, whole, ratio, config, protect) as keep:
        model(ids, use_cache=False)
    visible = torch.ones(ids.shape[1], dtype=torch.bool)
    for layer in LAYERS:
        visible &= keep[layer][0] > 0.5
        assert visible.nonzero().flatten().tolist() == trace.kept_positions[layer][0].tolist()
        assert visible[10:30].all()


def test_protection_of_samples_travels_with_their_labels_into_the_losses(tiny_model, tmp_path):
    model, some = tiny_model(), samples(3)
    some[1]["protect"] = [5 <= place < 25 for place in range(len(some[1]["prompt_ids"]))]
    rows = compute_saliency(model, some, LAYERS, cache_dir=tmp_path, progress=False, store_hidden=True)
    batch = Collator(LAYERS)([rows[index] for index in range(3)])
    assert batch["protect_mask"].sum(dim=1).tolist() == [0, 20, 0]
    assert (batch["protect_mask"] <= batch["prompt_mask"]).all()
    torch.manual_seed(0)
    step = PrunerLoss(TokenPruners.for_model(model, LAYERS), model, LAYERS, QUICK).eval()
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"].transpose(1, 2)[batch["protect_mask"]] *= 50
    assert torch.equal(step(**batch)["loss"], step(**other)["loss"]), "their labels teach nothing"
    del other["protect_mask"]
    assert not torch.equal(step(**batch)["loss"], step(**other)["loss"])
    some[0]["protect"] = [True]
    with pytest.raises(ValueError, match=r"protect of sample 's0' has 1 entries for a prompt of 40 tokens"):
        compute_saliency(model, some, LAYERS, cache_dir=tmp_path, progress=False)


def test_a_blend_of_another_window_is_refused_in_training(tiny_model):
    pruners = TokenPruners(32, LAYERS, blend={"attention": 1.0, "window": 4})
    with (
        pytest.raises(ValueError, match=r"blend\.window=4 .* give 16"),
        simulated_pruning(tiny_model(), pruners, torch.ones(1, 30, dtype=torch.bool), 0.7, TrainingConfig()),
    ):
        pass


@pytest.mark.parametrize("stored", [True, False])
def test_stored_inputs_give_the_losses_that_the_model_would_give(tiny_model, tmp_path, stored):
    model = tiny_model()
    rows = compute_saliency(model, samples(3), LAYERS, cache_dir=tmp_path, progress=False, store_hidden=stored)
    torch.manual_seed(0)
    pruners = TokenPruners.for_model(model, LAYERS, features=("hidden", "distance", "query", "attention"))
    batch = Collator(LAYERS, pruners.earlier_layers)([rows[i] for i in range(3)])
    assert ("attention" in batch) == stored
    loss = PrunerLoss(pruners, model, LAYERS, QUICK).eval()
    alone = [Collator(LAYERS, pruners.earlier_layers)([{**rows[i], "file": None}]) for i in range(3)]
    assert all("attention" not in each for each in alone)
    expected = torch.stack([loss(**each)["mse_loss"] for each in alone])
    lengths = torch.tensor([float(each["prompt_mask"].sum()) for each in alone])
    # Rows weigh by the tokens that count: all but 2 x 4 protected ones (4 sinks, at least 4 or a tenth at the end).
    counted = lengths - 4 - (0.1 * lengths).ceil().clamp(min=4)
    torch.testing.assert_close(loss(**batch)["mse_loss"], (expected * counted).sum() / counted.sum(), rtol=2e-2, atol=0)


def test_labels_stored_for_other_stages_are_not_taken_for_these(tiny_model, labelled):
    pruners = TokenPruners.for_model(tiny_model(), (3,), features=("hidden", "attention"))
    assert pruners.earlier_layers == {3: (0, 1, 2)}, "stored with stages 1 and 3, stage 3 looks back at 1, 1 and 2"
    assert "hidden" not in Collator((3,), pruners.earlier_layers)([labelled[0]])
    assert "hidden" in Collator((3,))([labelled[0]])


def test_mixed_precision_leaves_the_scores_in_float32(tiny_model, labelled):
    """They were rounded to bfloat16: the gradient of the ranking was 9 % off, and scores at the cut were equal."""
    torch.manual_seed(0)
    pruners = TokenPruners(32, LAYERS, features=("hidden", "distance", "query", "memory"))
    loss, gradients = PrunerLoss(pruners, tiny_model(), LAYERS, QUICK.replace(drop_weight=1.0)), []
    for mixed in (False, True):
        pruners.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            total = loss(**batch_of(labelled, [0, 1]))["loss"]
        total.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in pruners.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("off", ["mse", "rank", "drop"])
def test_each_loss_can_be_switched_off(tiny_model, labelled, off):
    config = QUICK.replace(**{"drop_weight": 1.0, f"{off}_weight": 0.0})
    loss = PrunerLoss(TokenPruners(32, LAYERS), tiny_model(), LAYERS, config)
    outputs = loss(**batch_of(labelled, [0, 1]))
    assert {name for name in outputs if name.endswith("_loss")} == {
        f"{name}_loss" for name in ("mse", "rank", "drop") if name != off
    }
