"""Training on `Trainer`: what is saved, what is resumed, which loss reaches what, and the traps of earlier tries."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.pruning.stage import QUERY_TOKENS
from sdtp_lib.scorers.stage_network import StageInputs
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.training import losses
from sdtp_lib.training.config import TrainingConfig
from sdtp_lib.training.saliency import compute_saliency
from sdtp_lib.training.simulation import KeptTokens, share_of_kept, simulated_pruning
from sdtp_lib.training.step import Collator, PrunerLoss
from sdtp_lib.training.trainer import split_by_id, train_pruners

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (1, 3)
QUICK = TrainingConfig(
    epochs=2, batch_size=2, eval_share=0.3, min_local_tokens=4, save_steps=3, logging_steps=1, learning_rate=1e-2
)


def samples(count=8, tokens=40):
    generator = torch.Generator().manual_seed(7)
    return [
        {
            "id": f"s{i}",
            "prompt_ids": torch.randint(3, 120, (tokens + i,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 120, (4,), generator=generator).tolist(),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def labelled(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    return compute_saliency(tiny_model(), samples(), LAYERS, cache_dir=folder, progress=False, store_hidden=True)


TWO_PROCESSES = """
import json
from pathlib import Path
from accelerate import debug_launcher
from transformers import AutoModelForCausalLM
from sdtp_lib.processes import Share
from sdtp_lib.training.saliency import compute_saliency
from sdtp_lib.training.trainer import train_pruners
from test_trainer import LAYERS, QUICK, samples

def work():
    share, model = Share(), AutoModelForCausalLM.from_pretrained("model")
    model.requires_grad_(False).eval()
    about = {"cache_dir": "labels", "progress": False, "store_hidden": True}
    own = compute_saliency(model, share.of(samples()), LAYERS, **about)
    share.wait()
    labelled = compute_saliency(model, samples(), LAYERS, **about)
    config = QUICK.replace(epochs=4, eval_share=0.0)
    pruners = train_pruners(model, labelled, config, output_dir="out", progress=False)
    weights = float(sum(p.detach().double().sum() for p in pruners.parameters()))
    told = {"own": min(own.num_rows, 4), "labelled": labelled.num_rows, "weights": weights}
    Path(f"rank{share.index}.json").write_text(json.dumps(told))

if __name__ == "__main__":
    debug_launcher(work, num_processes=2)
"""


def batch_of(labelled, rows):
    return Collator(LAYERS)([labelled[i] for i in rows])


def test_training_lowers_the_loss_and_saves_pruners_only(tiny_model, labelled, tmp_path):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = QUICK.replace(epochs=15, eval_share=0.0)
    pruners = train_pruners(model, labelled, config, output_dir=tmp_path, progress=False)
    logged = [entry["loss"] for entry in pruners.history if "loss" in entry]
    assert sum(logged[-5:]) < 0.8 * sum(logged[:5])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for file in [*tmp_path.glob("checkpoint-*/*.safetensors"), *tmp_path.glob("pruners/*.safetensors")]:
        with safe_open(file, "pt") as stored:
            assert all("stages." in name for name in stored.keys()), file  # noqa: SIM118 - safe_open is no mapping
    assert sum(f.stat().st_size for f in (tmp_path / "pruners").iterdir()) < 100_000
    again = TokenPruners.from_pretrained(tmp_path / "pruners")
    assert again.layers == LAYERS
    assert again.weights_fingerprint == pruners.weights_fingerprint is not None


def test_stages_are_trained_in_the_order_of_the_layers_however_they_are_given(tiny_model, labelled, tmp_path):
    pruners = train_pruners(
        tiny_model(), labelled, QUICK.replace(epochs=1), layers=LAYERS[::-1], output_dir=tmp_path, progress=False
    )
    assert pruners.layers == LAYERS


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


def test_a_run_of_another_config_does_not_go_on_from_a_checkpoint(tiny_model, labelled, tmp_path):
    """It did: a checkpoint of 2 epochs at one learning rate was the beginning of a run at another."""
    model = tiny_model()
    train_pruners(model, labelled, QUICK, output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"checkpoints of another run \(learning_rate=0.01 there and 0.02 here\)"):
        train_pruners(model, labelled, QUICK.replace(learning_rate=0.02), output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another run \(weights="):
        train_pruners(tiny_model(seed=1), labelled, QUICK, output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another run \(pruners\)"):
        train_pruners(model, labelled, QUICK, output_dir=tmp_path, progress=False, width=5)
    anew = QUICK.replace(epochs=1, learning_rate=0.02)
    again = train_pruners(model, labelled, anew, output_dir=tmp_path, progress=False, resume=False)
    assert [entry["step"] for entry in again.history if "loss" in entry][0] == 1


def test_two_processes_train_one_set_from_shared_labels(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["labelled"] == ranks[1]["labelled"] == 8 and ranks[0]["own"] == ranks[1]["own"] == 4
    assert ranks[0]["weights"] == ranks[1]["weights"], "both processes end with one set"
    logged = [entry["loss"] for entry in json.loads((tmp_path / "out" / "history.json").read_text()) if "loss" in entry]
    assert len(logged) == 8, "8 samples in batches of 2 on 2 processes, 4 epochs"
    saved = TokenPruners.from_pretrained(tmp_path / "out" / "pruners")
    assert float(sum(p.detach().double().sum() for p in saved.parameters())) == pytest.approx(ranks[0]["weights"])


def test_a_killed_run_resumes_and_ends_where_an_unbroken_one_does(tiny_model, labelled, tmp_path):
    unbroken = train_pruners(tiny_model(), labelled, QUICK, output_dir=tmp_path / "a", progress=False)
    train_pruners(tiny_model(), labelled, QUICK, output_dir=tmp_path / "b", progress=False)
    last = sorted((tmp_path / "b").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert len(last) == 2
    import shutil

    shutil.rmtree(last[-1])
    shutil.rmtree(tmp_path / "b" / "pruners")
    resumed = train_pruners(tiny_model(), labelled, QUICK, output_dir=tmp_path / "b", progress=False)
    first_step = int(last[0].name.split("-")[1])
    assert [e["step"] for e in resumed.history if "loss" in e][-1] > first_step
    assert set(resumed.state_dict()) == set(unbroken.state_dict())


@pytest.mark.parametrize("off", ["mse", "rank", "drop"])
def test_each_loss_can_be_switched_off(tiny_model, labelled, off):
    config = QUICK.replace(**{"drop_weight": 1.0, f"{off}_weight": 0.0})
    loss = PrunerLoss(TokenPruners(32, LAYERS), tiny_model(), LAYERS, config)
    outputs = loss(**batch_of(labelled, [0, 1]))
    assert {name for name in outputs if name.endswith("_loss")} == {
        f"{name}_loss" for name in ("mse", "rank", "drop") if name != off
    }


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


def test_the_loss_of_a_row_does_not_change_with_its_padding(tiny_model, labelled):
    torch.manual_seed(0)
    loss = PrunerLoss(TokenPruners(32, LAYERS, features=("hidden", "distance", "query")), tiny_model(), LAYERS, QUICK)
    loss.eval()
    apart = (loss(**batch_of(labelled, [0]))["rank_loss"] + loss(**batch_of(labelled, [7]))["rank_loss"]) / 2
    together = loss(**batch_of(labelled, [0, 7]))["rank_loss"]
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("straight_through", [True, False])
def test_the_pruned_models_loss_reaches_every_stage_of_the_pruners_and_no_weight(
    tiny_model, labelled, straight_through
):
    """An earlier reproduction multiplied hidden states by the mask; here keys are masked in attention."""
    model = tiny_model()
    config = QUICK.replace(
        mse_weight=0.0, rank_weight=0.0, distill_weight=1.0, lm_weight=1.0, straight_through=straight_through
    )
    torch.manual_seed(0)
    pruners = TokenPruners(32, LAYERS)
    outputs = PrunerLoss(pruners, model, LAYERS, config)(**batch_of(labelled, [0, 5]))
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


def test_a_sample_stays_on_its_side_of_the_split_when_others_come_or_go(labelled):
    config = TrainingConfig(eval_share=0.4)
    _, held_out = split_by_id(labelled, config)
    some = labelled.select([7, 2, 0, 5])
    _, held_out_of_some = split_by_id(some, config)
    wanted = set(held_out["sample_id"]) & set(some["sample_id"])
    assert set(held_out_of_some["sample_id"] if held_out_of_some else []) == wanted


def test_training_goes_on_from_given_pruners(tiny_model, labelled, tmp_path):
    torch.manual_seed(1)
    start = TokenPruners(32, LAYERS)
    config = QUICK.replace(learning_rate=1e-9, weight_decay=0.0, epochs=1, eval_share=0.0)
    before = start.stages["1"].down.weight.detach().clone()
    after = train_pruners(tiny_model(), labelled, config, pruners=start, output_dir=tmp_path, progress=False)
    torch.testing.assert_close(after.stages["1"].down.weight, before)


def test_samples_without_labels_at_a_layer_are_refused(tiny_model, labelled, tmp_path):
    with pytest.raises(ValueError, match=r"no labels at \[2\]"):
        train_pruners(tiny_model(), labelled, QUICK, layers=(1, 2), output_dir=tmp_path)
    with pytest.raises(ValueError, match="samples is empty"):
        train_pruners(tiny_model(), [], QUICK, output_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"mse_weight": -1}, "mse_weight=-1"),
        ({"mse_weight": 0, "rank_weight": 0}, "every loss"),
        ({"keep_ratios": (0.9, 0.5)}, "keep_ratios"),
        ({"eval_share": 1.0}, "eval_share=1.0"),
        ({"mixed_precision": "int3"}, "int3"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(change, match):
    with pytest.raises(ValueError, match=match):
        TrainingConfig(**change)


def test_the_config_is_plain_json():
    values = TrainingConfig().to_dict()
    assert TrainingConfig(**values) == TrainingConfig()
    assert math.isclose(values["keep_ratios"][0], 0.6)


def test_the_log_has_every_loss_with_a_weight_under_the_name_that_the_figure_asks_for(tiny_model, labelled, tmp_path):
    config = QUICK.replace(epochs=1, drop_weight=1.0)
    pruners = train_pruners(tiny_model(), labelled, config, output_dir=tmp_path, progress=False)
    wanted = {"loss", *(f"{name}_loss" for name, weight in config.weights().items() if weight)}
    assert wanted == {"loss", "mse_loss", "rank_loss", "drop_loss"}
    assert all(wanted <= set(entry) for entry in pruners.history if "loss" in entry)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mixed_precision_on_a_cpu_is_refused_before_any_label_is_made(tiny_model, tmp_path, kind):
    with pytest.raises(ValueError, match=f"mixed_precision='{kind}' needs a GPU, and the model is on the CPU"):
        train_pruners(tiny_model(), [{"id": "never read"}], QUICK.replace(mixed_precision=kind), output_dir=tmp_path)
    assert not list(tmp_path.iterdir())
