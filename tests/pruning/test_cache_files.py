"""A pruned cache that was written to disk and read again goes on as it would have."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtp_lib import PruningNotSupported, load_pruned_cache, save_pruned_cache, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in, cache_lengths
from tests.pruning.chunked import CONFIG, OLD, tokens_of
from tests.reference import louder

FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 40}, "gemma3_text": {"sliding_window": 24}, "gpt2": {}, "bloom": {}
}  # fmt: skip


def _model(tiny_model, family="llama", **more):
    model = louder(tiny_model(family, **{**FAMILIES.get(family, {}), **more}))
    model.generation_config.eos_token_id = None
    return model


def _document(model, ids, config=CONFIG, **arguments):
    with token_pruning(model, config, scorers.attention(4)):
        out = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, **arguments)
    return out.sequences, cache_in(out)


def _asked(model, ids, cache, question, config=CONFIG, **arguments):
    with token_pruning(model, config, scorers.attention(4)):
        out = model.generate(
            torch.cat([ids, question], dim=1), **cache_argument(model, copy.deepcopy(cache)), max_new_tokens=4,
            do_sample=False, return_dict_in_generate=True, output_logits=True, **arguments,
        )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turns", ["first", "every"])
def test_a_saved_cache_answers_every_question_as_the_one_in_memory(tiny_model, tmp_path, family, turns):
    model, config = _model(tiny_model, family), CONFIG.replace(prune=turns)
    ids, cache = _document(model, tokens_of(80), config)
    path = save_pruned_cache(cache, tmp_path / "document.safetensors", model)
    loaded = load_pruned_cache(path, model)
    assert cache_lengths(loaded) == cache_lengths(cache)
    assert [file.name for file in tmp_path.iterdir()] == ["document.safetensors"]
    for seed, length in ((5, 6), (6, 30)):
        question = tokens_of(length, seed)
        found, expected = (_asked(model, ids, each, question, config) for each in (loaded, cache))
        assert torch.equal(found, expected)
    again = load_pruned_cache(save_pruned_cache(loaded, tmp_path / "again.safetensors", model), model)
    found, expected = (_asked(model, ids, each, tokens_of(6, 5), config) for each in (again, cache))
    assert torch.equal(found, expected)


def test_rows_of_a_batch_compact_positions_and_chunks_go_to_disk_too(tiny_model, tmp_path):
    model = _model(tiny_model)
    rows = torch.cat([torch.zeros(1, 20, dtype=torch.long), tokens_of(60, 1)], dim=1)
    ids, mask = torch.cat([rows, tokens_of(80, 2)]), torch.ones(2, 80, dtype=torch.long)
    mask[0, :20] = 0
    cases = [(ids, CONFIG, {"attention_mask": mask}), (tokens_of(80), CONFIG.replace(positions="compact"), {}),
             (tokens_of(80), CONFIG, {"prefill_chunk_size": 30})]  # fmt: skip
    if OLD:  # refused there
        cases.pop()
    for number, (prompt, config, more) in enumerate(cases):
        sequence, cache = _document(model, prompt, config, **more)
        loaded = load_pruned_cache(save_pruned_cache(cache, tmp_path / f"{number}.safetensors", model), model)
        question = tokens_of(5, 7, rows=len(prompt))
        if "attention_mask" in more:
            more = {"attention_mask": torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], dim=1)}
        found, expected = (_asked(model, sequence, each, question, config, **more) for each in (loaded, cache))
        assert torch.equal(found, expected)


def test_layers_between_two_cuts_share_their_record_on_disk_and_in_memory(tiny_model, tmp_path):
    model = _model(tiny_model)
    _, cache = _document(model, tokens_of(80))
    path = save_pruned_cache(cache, tmp_path / "document.safetensors", model)
    assert sorted(name for name in load_file(path) if name.startswith("kept")) == ["kept.0", "kept.1", "kept.2"]
    record = load_pruned_cache(path, model).record
    assert record.kept[1] is record.kept[2] and record.kept[0] is None


def test_a_cache_that_was_not_pruned_is_saved_as_it_is(tiny_model, tmp_path):
    model = _model(tiny_model)
    out = model.generate(tokens_of(30), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    loaded = load_pruned_cache(save_pruned_cache(cache_in(out), tmp_path / "plain.safetensors", model), model)
    assert type(loaded) is type(cache_in(out)) and cache_lengths(loaded) == cache_lengths(cache_in(out))


def test_another_model_is_refused_by_what_differs(tiny_model, tmp_path):
    model = _model(tiny_model)
    _, cache = _document(model, tokens_of(80))
    path = save_pruned_cache(cache, tmp_path / "document.safetensors", model)
    for match, other in (
        ("num_hidden_layers=6.*num_hidden_layers=5", _model(tiny_model, num_hidden_layers=5)),
        ("num_key_value_heads=2.*num_key_value_heads=4", _model(tiny_model, num_key_value_heads=4)),
        ("model_type=llama.*model_type=qwen2", _model(tiny_model, "qwen2")),
        ("dtype=float32.*dtype=bfloat16", _model(tiny_model, dtype=torch.bfloat16)),
        ("weights=", _model(tiny_model, seed=1)),
    ):
        with pytest.raises(ValueError, match=match):
            load_pruned_cache(path, other)
    assert load_pruned_cache(path, _model(tiny_model)) is not None


def test_files_that_are_no_whole_cache_are_refused(tiny_model, tmp_path):
    model = _model(tiny_model)
    _, cache = _document(model, tokens_of(80))
    path = save_pruned_cache(cache, tmp_path / "document.safetensors", model)
    with pytest.raises(FileNotFoundError):
        load_pruned_cache(tmp_path / "nowhere.safetensors", model)
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"half.safetensors is damaged"):
        load_pruned_cache(half, model)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no cache"):
        load_pruned_cache(tmp_path / "other.safetensors", model)


def test_a_cache_that_cannot_be_read_is_not_saved(tiny_model, tmp_path):
    from transformers import DynamicCache, StaticCache

    model = _model(tiny_model)
    for cache in (StaticCache(config=model.config, max_cache_len=32), DynamicCache()):
        with pytest.raises(PruningNotSupported, match="dynamic cache with tokens"):
            save_pruned_cache(cache, tmp_path / "no.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_what_was_there(tiny_model, tmp_path, monkeypatch):
    from sdtp_lib.pruning import cache_files

    model = _model(tiny_model)
    _, cache = _document(model, tokens_of(80))
    path = save_pruned_cache(cache, tmp_path / "document.safetensors", model)
    before = path.read_bytes()

    def fails(tensors, to, metadata):
        to.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(cache_files, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        save_pruned_cache(cache, path, model)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["document.safetensors"]
