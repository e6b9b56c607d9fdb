"""Pruners on disk: what a folder must hold, what is refused, and that a reload is the same pruners."""

from __future__ import annotations

import json

import pytest
import torch

from sdtp_lib.scorers.token_pruners import TokenPruners


@pytest.fixture
def saved(tmp_path):
    TokenPruners(16, (1, 3)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("layers", [[1, 3, 5], [1]])
def test_a_config_that_names_other_stages_than_the_weights_is_refused(saved, layers):
    """The stage that the weights lacked was loaded as random numbers, other ones each time."""
    with_config(saved, layers=layers)
    stage = 5 if 5 in layers else 3
    with pytest.raises(OSError, match=rf"model.safetensors does not fit config.json at stage\(s\) {stage}; write both"):
        TokenPruners.from_pretrained(saved)


def test_a_folder_that_holds_no_pruners_is_refused_by_what_it_lacks(saved, tmp_path):
    with pytest.raises(OSError, match="nowhere': there is no such folder"):
        TokenPruners.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="it lacks config.json and model.safetensors"):
        TokenPruners.from_pretrained(tmp_path / "empty")
    (saved / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(OSError, match=r"Cannot load pruners from .*: write it again with save_pretrained"):
        TokenPruners.from_pretrained(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match="it lacks model.safetensors"):
        TokenPruners.from_pretrained(saved)


def test_pruners_of_the_hub_say_what_helps_against_the_cause():
    with pytest.raises(OSError, match=r"Cannot load pruners from 'someone/pruners' \(.*\): unset HF_HUB_OFFLINE"):
        TokenPruners.from_pretrained("someone/pruners")


def test_a_wrong_field_of_a_saved_config_names_the_field(saved):
    with_config(saved, attention_kernel=4)
    with pytest.raises(ValueError, match="attention_kernel=4"):
        TokenPruners.from_pretrained(saved)


def test_pruners_are_told_apart_by_weights_and_settings_and_keep_their_identity_on_disk(saved):
    first = TokenPruners.from_pretrained(saved)
    assert TokenPruners.from_pretrained(saved).identity == first.identity
    assert TokenPruners.from_pretrained(saved, blend={"recency": 1.0}).identity != first.identity
    with torch.no_grad():
        first.stages["1"].out.bias.add_(1.0)
    assert TokenPruners.from_pretrained(saved).identity != first.identity


def test_loading_prints_nothing(tiny_model, tmp_path, capfd):
    TokenPruners.for_model(tiny_model(), (2,)).save_pretrained(tmp_path)
    capfd.readouterr()
    TokenPruners.from_pretrained(tmp_path)
    assert capfd.readouterr() == ("", "")
