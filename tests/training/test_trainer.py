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

from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.training import trainer
from sdtp_lib.training.config import TrainingConfig
from sdtp_lib.training.saliency import compute_saliency
from sdtp_lib.training.simulation import KeptTokens
from sdtp_lib.training.step import PrunerLoss
from sdtp_lib.training.trainer import split_by_id, train_pruners
from tests.training.made_up import LAYERS, QUICK, samples

ROOT = Path(__file__).resolve().parents[2]


TWO_PROCESSES = """
import json
from pathlib import Path
from accelerate import debug_launcher
from transformers import AutoModelForCausalLM
from sdtp_lib.processes import Share
from sdtp_lib.training.saliency import compute_saliency
from sdtp_lib.training.step import PrunerLoss
from sdtp_lib.training.trainer import train_pruners
from tests.training.made_up import LAYERS, QUICK, samples

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


def test_a_stage_that_no_loss_reaches_is_told_at_the_first_step(tiny_model, labelled, tmp_path, monkeypatch):
    """The loss on predictions reached the last stage alone for days: the others were saved as they had begun."""
    score = KeptTokens.score

    def without_graph(self, layer, *args, **kwargs):
        found = score(self, layer, *args, **kwargs)
        return found.detach() if layer == LAYERS[0] else found

    monkeypatch.setattr(KeptTokens, "score", without_graph)
    with pytest.raises(RuntimeError, match=rf"no loss reaches the pruners of the stages at layers \[{LAYERS[0]}\]"):
        train_pruners(tiny_model(), labelled, QUICK, output_dir=tmp_path, progress=False)


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


def test_a_run_of_another_config_does_not_go_on_from_a_checkpoint(tiny_model, labelled, tmp_path):
    """It did: a checkpoint of 2 epochs at one learning rate was the beginning of a run at another."""
    model = tiny_model()
    train_pruners(model, labelled, QUICK, output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"checkpoints of another run \(learning_rate=0.01 there and 0.02 here\)"):
        train_pruners(model, labelled, QUICK.replace(learning_rate=0.02), output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another run \(weights="):
        train_pruners(tiny_model(seed=1), labelled, QUICK, output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"another run \(pruners, begun="):
        train_pruners(model, labelled, QUICK, output_dir=tmp_path, progress=False, width=5)
    anew = QUICK.replace(epochs=1, learning_rate=0.02)
    again = train_pruners(model, labelled, anew, output_dir=tmp_path, progress=False, resume=False)
    assert [entry["step"] for entry in again.history if "loss" in entry][0] == 1


def test_two_processes_train_one_set_from_shared_labels(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
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


def test_a_killed_run_resumes_and_ends_where_an_unbroken_one_does(tiny_model, labelled, tmp_path, monkeypatch):
    """It drew its keep ratios from the beginning again, and the test looked at the names of the weights only."""
    unbroken = train_pruners(tiny_model(), labelled, QUICK, output_dir=tmp_path / "a", progress=False)

    class Killed(PrunerLoss):
        def forward(self, *arguments, **inputs):
            if self.training and self.number == 4:
                raise KeyboardInterrupt
            return super().forward(*arguments, **inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "PrunerLoss", Killed)
        train_pruners(tiny_model(), labelled, QUICK, output_dir=tmp_path / "b", progress=False)
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = train_pruners(tiny_model(), labelled, QUICK, output_dir=tmp_path / "b", progress=False)
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_run_that_has_ended_is_read_and_not_trained_further(tiny_model, labelled, tmp_path):
    """One that had stopped early went on for another round of patience each time that it was called."""
    config = QUICK.replace(epochs=40, patience=1, learning_rate=0.3)
    first = train_pruners(tiny_model(), labelled, config, output_dir=tmp_path, progress=False)
    steps = [line["step"] for line in first.history]
    assert max(steps) < 40 * 3, "it stopped early"
    again = train_pruners(tiny_model(), labelled, config, output_dir=tmp_path, progress=False)
    assert [line["step"] for line in again.history] == steps and again.identity == first.identity


def test_a_run_from_before_a_field_was_there_is_the_same_run(tiny_model, labelled, tmp_path):
    """A new field with a default that changes nothing had made each older folder another run's."""
    options = {"output_dir": tmp_path, "progress": False, "layers": LAYERS}
    first = train_pruners(tiny_model(), labelled, QUICK, **options)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run.pop("input_dropout") == 0.0
    (tmp_path / "run.json").write_text(json.dumps(run))
    again = train_pruners(tiny_model(), labelled, QUICK, **options)
    assert again.identity == first.identity
    with pytest.raises(ValueError, match=r"input_dropout=0\.0 there and 0\.1 here"):
        train_pruners(tiny_model(), labelled, QUICK.replace(input_dropout=0.1), **options)


@pytest.mark.parametrize("what", ["label", "protect", "begun"])
def test_other_samples_or_another_start_are_another_run(tiny_model, labelled, tmp_path, what):
    train_pruners(tiny_model(), labelled, QUICK, output_dir=tmp_path, progress=False)
    rows, more = [labelled[index] for index in range(len(labelled))], {}
    if what == "label":
        rows[3]["layer_3"] = [2 * value for value in rows[3]["layer_3"]]
    if what == "protect":
        rows = [{**row, "protect": [False] * row["prompt_length"]} for row in rows]
    if what == "begun":
        torch.manual_seed(5)
        more = {"pruners": TokenPruners(32, LAYERS)}
    with pytest.raises(ValueError, match=f"another run .*{'begun' if more else 'samples'}"):
        train_pruners(tiny_model(), type(labelled).from_list(rows), QUICK, output_dir=tmp_path, progress=False, **more)


def test_a_loss_that_is_no_number_ends_training_at_its_step(tiny_model, labelled, tmp_path):
    """Trainer logs such a loss as 0, and pruners without numbers were saved."""
    rows = [labelled[index] for index in range(len(labelled))]
    for row in rows:
        row["layer_3"] = [float("nan")] * row["prompt_length"]
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is no finite number \(.*mse_loss nan"):
        train_pruners(tiny_model(), type(labelled).from_list(rows), QUICK, output_dir=tmp_path, progress=False)
    assert not (tmp_path / "pruners").exists()


def test_one_process_uses_one_gpu(tmp_path, monkeypatch):
    """`Trainer` puts several into `nn.DataParallel`, whose copies of the pruners have no parameters."""
    monkeypatch.setattr(trainer.TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu") or 4))
    assert trainer._arguments(QUICK, tmp_path, False, False).n_gpu == 1


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


def test_pruners_note_the_label_that_they_were_trained_on_where_it_is_known(tiny_model, tmp_path):
    """On labels that were given they noted the default one, whichever it was, and of several all."""
    model, config, names = tiny_model(), QUICK.replace(epochs=1), ("gradient_x_hidden", "removal")
    about = {"cache_dir": tmp_path / "labels", "progress": False}
    given = compute_saliency(model, samples(4), LAYERS, names, **about)
    assert train_pruners(model, given, config, output_dir=tmp_path / "a", progress=False).notes == {}
    more = {"label": names, "layers": LAYERS, **about}
    made = train_pruners(model, samples(4), config, output_dir=tmp_path / "b", **more)
    assert made.notes == {"label": "gradient_x_hidden"}


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
        ({"input_dropout": 1.0}, "input_dropout=1.0"),
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
