"""The explorer's source on a tiny model: scores, answers, typed prompts, pruners that do not fit."""

from __future__ import annotations

import pytest

from sdtp_lib.explorer import engine_source
from sdtp_lib.explorer.engine_source import EngineSource
from sdtp_lib.explorer.state import ExplorerState
from sdtp_lib.scorers.token_pruners import TokenPruners


@pytest.fixture
def source(tiny_model, tiny_tokenizer):
    prompts = {"long": list(range(5, 95)), "one": [7], "empty": []}
    found = engine_source.default_scorers(None)
    return EngineSource(tiny_model(), tiny_tokenizer, prompts, found, max_new_tokens=3)


def test_scores_and_real_runs_come_with_progress_in_words(source):
    told = []
    source.on_progress = lambda *step: told.append(step)
    state = ExplorerState(source, layers=(2, 4), keep_ratio=0.5) if source.num_layers > 4 else None
    outcome = state.run()
    assert outcome.fates.kept_count == 22 and outcome.kv_bytes < outcome.full_kv_bytes
    assert {words for words, _, _ in told} == {
        "scoring: attention", "answering, nothing dropped", "answering, pruned"
    }  # fmt: skip
    assert [done for words, done, _ in told if words.startswith("scoring")] == list(range(1, source.num_layers))


@pytest.mark.parametrize("name", ["one", "empty"])
def test_a_prompt_too_short_to_prune_is_refused_in_words_and_the_state_stays(source, name):
    state = ExplorerState(source)
    with pytest.raises(ValueError, match="needs at least 2"):
        state.update(prompt=name)
    assert state.prompt == "long" and state.fates.tokens == 90


def test_a_typed_prompt_replaces_the_one_before(source):
    state = ExplorerState(source)
    for text in ("the first text of many words", "another"):
        source.add_prompt("my prompt", text)
        state.update(prompt="my prompt")
        assert text in "".join(state.scored.tokens)


def test_pruners_of_another_model_are_left_out_with_a_sentence(tiny_model, tmp_path):
    TokenPruners.for_model(tiny_model(hidden_size=64), (2, 4)).save_pretrained(tmp_path)
    found, notes = engine_source.fitting_scorers(tiny_model(), tmp_path)
    assert "learned" not in found and "recency" in found
    (note,) = notes
    assert "left out" in note and "hidden_size=64" in note


def test_pruners_that_are_not_there_are_told_in_a_sentence(tiny_model):
    found, (note,) = engine_source.fitting_scorers(tiny_model(), "no-such-pruners")
    assert "learned" not in found and note.startswith("There are no trained pruners no-such-pruners: ")
    assert engine_source.fitting_scorers(tiny_model(), None)[1] == []


def test_protected_tokens_reach_the_last_layer_in_the_picture_and_in_the_engine(source):
    state = ExplorerState(source, scorer="recency", layers=(2, 4), keep_ratio=0.3)
    assert (state.fates.dropped_at[30:34] == 2).all()
    state.update(protect=(30, 31, 32, 33))
    approximate = state.fates
    outcome = state.run()
    assert (outcome.fates.dropped_at[30:34] == source.num_layers).all()
    assert (outcome.fates.dropped_at == approximate.dropped_at).all()
