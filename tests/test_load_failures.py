"""A failed load says what helps against its cause, whatever wrapped it."""

from __future__ import annotations

import json
import shutil

import huggingface_hub.errors as hub
import pytest
import safetensors.torch

from sdtp_lib.load_failures import CAUSES, cause_of, sentence
from sdtp_lib.models import load_model


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


def of_hub(name: str, message: str) -> BaseException:
    """An error of the Hub's client without the response that its constructor asks for."""
    kind = getattr(hub, name)
    error = kind.__new__(kind)
    error.args = (message,)
    return error


class ConnectError(Exception):
    """As the Hub's HTTP client calls it."""


NOT_FOUND = "x/y is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'"
ERRORS = {
    "disk full": raised(OSError("Cannot write"), OSError(28, "No space left on device")),
    "gated": raised(OSError("You are trying to access a gated repo."), of_hub("GatedRepoError", "403")),
    "revision": raised(OSError("nope is not a valid git identifier"), of_hub("RevisionNotFoundError", "404")),
    "offline": raised(OSError("We couldn't connect to the Hub"), of_hub("OfflineModeIsEnabled", "no")),
    "id": raised(OSError(NOT_FOUND), of_hub("RepositoryNotFoundError", "404")),
    "no such file": OSError("x/y does not appear to have a file named config.json."),
    "busy": OSError("Client error '429 Too Many Requests' for url"),
    "network": raised(OSError("We couldn't connect to the Hub"), ConnectError("Name or service not known")),
    "permission": raised(OSError("Cannot write"), PermissionError(13, "Permission denied")),
    "remote code": ValueError("Please pass the argument `trust_remote_code=True` to allow custom code to be run."),
    "flash attention": ImportError("FlashAttention2 has been toggled on, but it cannot be used"),
    "attention": ValueError('Specified `attn_implementation="nonsense"` is not supported.'),
    "tokenizer": ValueError("Couldn't instantiate the backend tokenizer from one of:"),
    "accelerate": ValueError("Using a `device_map` requires `accelerate`."),
    "package": ImportError("Using `bitsandbytes` requires it: `pip install -U bitsandbytes`"),
    "architecture": ValueError("model type `newfangled` but Transformers does not recognize this architecture."),
    "not a causal language model": ValueError("Unrecognized configuration class <class 'ViTConfig'>"),
}


def test_every_cause_of_the_table_has_an_example_here():
    assert set(ERRORS) == {cause.name for cause in CAUSES}


@pytest.mark.parametrize("name", ERRORS)
def test_a_cause_is_found_under_what_wrapped_it_and_its_remedy_is_said(name):
    error = ERRORS[name]
    assert cause_of(error).name == name
    told = sentence(raised(OSError("Cannot load\nand a long second line"), error), "never this")
    assert cause_of(error).remedy in told and "\n" not in told


def test_an_unknown_cause_gets_the_remedy_of_whoever_loads():
    assert sentence(ValueError("It broke."), "write it again") == "(It broke): write it again."


@pytest.fixture
def folder(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def without_a_weight(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    shutil.copy(folder / "config.json", folder / "tokenizer_config.json")


@pytest.mark.parametrize(
    ("damage", "options", "remedy"),
    [
        (lambda folder: None, {"attn_implementation": "flash_attention_2"}, "attn_implementation='sdpa'"),
        (lambda folder: None, {"attn_implementation": "nonsense"}, "'sdpa' or 'eager'"),
        (lambda folder: changed(folder, model_type="newfangled"), {}, "install a transformers that knows it"),
        (lambda folder: changed(folder, model_type="vit"), {}, "give a causal language model"),
        (cut_weights, {}, "write it again with save_pretrained"),
        (no_tokenizer, {}, "add the tokenizer's files"),  # transformers 5.2 made an empty one
        (without_a_weight, {}, r"lack 1 tensor\(s\): model.layers.1.mlp.up_proj.weight\): the folder is incomplete"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_loaded_says_why_and_what_helps(folder, damage, options, remedy):
    damage(folder)
    with pytest.raises(OSError, match=remedy) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value) and "network" not in str(caught.value)
