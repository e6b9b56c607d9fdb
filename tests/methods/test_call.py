"""The one call: what a person may say for a budget and a scorer, and what is chosen and said when they do not."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch

from sdtp_lib import PruningConfig, TokenPruners, budget, methods, scorers, token_pruning
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.protection import protected_tokens_of
from sdtp_lib.pruning.stage import refuse_uncalled
from sdtp_lib.scorers.found import training_free_layers

PROMPT = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(1))
CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """No test finds pruners that somebody trained on this machine."""
    monkeypatch.setenv("SDTP_PRUNERS", str(tmp_path / "pruners"))
    return tmp_path / "pruners"


def _trace(model, *arguments, ids=PROMPT, **options):
    with torch.no_grad(), token_pruning(model, *arguments, **options) as trace:
        model(input_ids=ids)
    return trace


@pytest.mark.parametrize(
    ("said", "layers", "tokens"),
    [
        ("keep08", [4], 160),
        (0.7, [4], 140),
        (PruningConfig(layers=(2,), keep_ratio=0.5), [2], 100),
        (1.0, [4], 200),
    ],
)
def test_a_budget_is_a_preset_a_ratio_or_a_configuration(tiny_model, said, layers, tokens):
    trace = _trace(tiny_model(), said, scorers.recency())
    assert (sorted(trace.kept_positions), trace.tokens_per_layer[-1]) == (layers, tokens)


def test_a_wanted_speedup_is_reached_by_flops(tiny_model):
    model = tiny_model()
    trace = _trace(model, "1.5x", scorers.recency())
    shape = ModelShape.from_model(model)
    full = budget.prefill_flops(shape, [200] * 6)
    # A token more or less is 1 % here.
    assert 1.5 <= full / budget.prefill_flops(shape, trace.tokens_per_layer) <= 1.53


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("keep8", "budget='keep8' is unknown: give keep09.*'2x'.* a method: sdtp, .*fastkv, "),
        ("fastkvv@1.5x", "budget='fastkvv@1.5x' is unknown: give keep09.* a method: sdtp, "),
        ("fastkv@fast", "'fast' is no speed-up: give fastkv@1.5x"),
        ("snapkv@2x", "snapkv shortens the cache only"),
        ("0.5x", "slower than the unpruned model"),
        (1.5, r"keep_ratio=1.5 is outside \(0, 1\]"),
        ({"layers": [4]}, "is not a PruningConfig"),
        (True, "budget=True is not a PruningConfig"),
    ],
)
def test_a_budget_that_is_none_is_refused_by_its_value(tiny_model, said, match):
    with pytest.raises(ValueError, match=match):
        _trace(tiny_model(), said, scorers.recency())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("2x", scorers.attention), "scorer=attention makes a scorer and is none itself: call it"),
        (("2x", scorers.recency), "scorer=recency makes a scorer"),
        (("2x", scorers.weighted), "scorer=weighted makes a scorer"),
        (("2x", TokenPruners), "scorer=TokenPruners is a class"),
        ((PruningConfig,), "budget=PruningConfig makes budgets and is none itself: call it"),
        ((PruningConfig.preset,), "budget=preset makes budgets"),
    ],
)
def test_what_makes_a_scorer_or_a_budget_and_was_not_called_is_refused_by_name(tiny_model, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        _trace(tiny_model(), *arguments)


@pytest.mark.parametrize("name", scorers.__all__)
def test_every_factory_of_scorers_is_known_as_one(name):
    if name != "name_of":
        with pytest.raises(ValueError, match=f"scorer={name} makes a scorer"):
            refuse_uncalled(getattr(scorers, name))


def test_a_scorer_may_be_named_and_an_unknown_name_lists_the_known_ones(tiny_model):
    model = tiny_model()
    assert torch.equal(
        _trace(model, CONFIG, "recency").kept_positions[3], _trace(model, CONFIG, scorers.recency()).kept_positions[3]
    )
    with pytest.raises(ValueError, match="scorer='recent' is unknown: give one of random, uniform, recency"):
        _trace(model, CONFIG, "recent")


def test_without_pruners_the_training_free_score_is_taken_and_said_once(tiny_model):
    model = tiny_model()
    with pytest.warns(UserWarning, match="no pruners were made for this model.*python -m sdtp_lib train") as said:
        trace = _trace(model, "1.5x")
    assert len(said) == 1
    assert trace.scorer == "attention, pooled"
    assert tuple(sorted(trace.kept_positions)) == training_free_layers(6) == (2,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(_trace(model, CONFIG).kept_positions) == [1, 3], "a named configuration keeps its layers"


def test_pruners_for_these_very_weights_are_found_and_others_are_not(tiny_model, own_folder):
    model, other = tiny_model(), tiny_model(seed=1)
    torch.manual_seed(0)
    TokenPruners.for_model(model, (1, 3)).save_pretrained(own_folder / "mine")
    (own_folder / "broken").mkdir()
    (own_folder / "broken" / "config.json").write_text('{"model_type"')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _trace(model, CONFIG).scorer == "learned"
        assert sorted(_trace(model, "1.2x").kept_positions) == [1, 3], "the schedule is the pruners' own"
    with pytest.warns(UserWarning, match="no pruners were made for this model's weights"):
        assert _trace(other, CONFIG).scorer == "attention, pooled"
    with pytest.warns(UserWarning, match=r"made for other layers \(mine scores before layers \[1, 3\]\)"):
        assert _trace(model, PruningConfig(layers=(2,))).scorer == "attention, pooled"


def test_print_is_one_line_that_a_person_understands_and_the_notebook_gets_a_table(tiny_model):
    model = tiny_model()
    trace = _trace(model, CONFIG, scorers.recency())
    line = str(trace)
    assert line.startswith("prompt: 200 tokens, last layer: 72 tokens (36%), 1/tau: 1.83, prefill FLOPs: -")
    assert "KV cache: -" in line and line.endswith("scorer: recency") and "\n" not in line
    assert repr(trace) == line
    assert trace._repr_html_().count("<tr>") == 6
    short = pickle.loads(pickle.dumps(trace))
    assert "FLOPs" not in str(short) and short.tokens_per_layer == trace.tokens_per_layer
    with token_pruning(model, CONFIG, scorers.recency()) as empty:
        pass
    assert str(empty) == "not pruned: no prefill ran inside the `with`"


CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_protected_tokens_are_named_by_characters_or_roles(tiny_tokenizer):
    text = "the rain in spain stays mainly in the plain"
    protect = protected_tokens_of(tiny_tokenizer, text, spans=[(12, 17)])
    encoded = tiny_tokenizer(text, return_offsets_mapping=True)
    inside = [first < 17 and last > 12 for first, last in encoded["offset_mapping"]]
    assert protect.tolist() == [inside] and any(inside)
    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)  # others share it
    tiny_tokenizer.chat_template = CHAT
    messages = [
        {"role": "system", "content": "stay plain"},
        {"role": "user", "content": "the rain"},
        {"role": "assistant", "content": "in spain"},
        {"role": "user", "content": "the plain"},
    ]
    rendered = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tiny_tokenizer(rendered, add_special_tokens=False).input_ids
    kept = protected_tokens_of(tiny_tokenizer, messages, roles=("system", "last_user"))
    assert kept.shape == (1, len(ids))
    words = tiny_tokenizer.decode([i for i, keep in zip(ids, kept[0].tolist(), strict=True) if keep])
    assert "stay plain" in words and "the plain" in words and "rain" not in words


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"spans": [(3, 90)]}, r"\(3, 90\), which is outside the text of 8 characters"),
        ({"roles": ("system",)}, "of a plain text: give the chat messages"),
    ],
)
def test_what_cannot_be_protected_is_said(tiny_tokenizer, arguments, match):
    with pytest.raises(ValueError, match=match):
        protected_tokens_of(tiny_tokenizer, "the rain", **arguments)


def test_a_folder_of_pruners_may_be_named_by_its_path(tiny_model, tmp_path):
    model = tiny_model()
    TokenPruners.for_model(model, (1, 3)).save_pretrained(tmp_path / "here")
    assert json.loads((tmp_path / "here" / "config.json").read_text())["layers"] == [1, 3]
    assert _trace(model, CONFIG, str(tmp_path / "here")).scorer == "learned"


def test_a_method_may_be_named_as_budget_or_as_scorer(tiny_model):
    model = tiny_model()
    by_name, by_entry = _trace(model, "lazyllm"), _trace(model, methods.get("lazyllm"))
    assert by_name.tokens_per_layer == by_entry.tokens_per_layer
    assert _trace(model, CONFIG, "fastkv").scorer == methods.get("fastkv").scorer_for(model).name


@pytest.mark.parametrize("said", ["fastkv@1.5x", "lazyllm@1.2x", "lazyllm"])
def test_a_method_may_be_said_as_commands_take_it_with_a_speed_up(tiny_model, said):
    """`methods.named` and every command took ``fastkv@1.5x``; the one call refused it."""
    model = tiny_model()
    by_text, by_entry = _trace(model, said), _trace(model, methods.named(said))
    assert by_text.tokens_per_layer == by_entry.tokens_per_layer and by_text.keys_per_layer == by_entry.keys_per_layer
    assert by_text.scorer == by_entry.scorer == said.partition("@")[0]
    if "@" in said:
        assert by_text.tokens_per_layer != _trace(model, by_text.scorer).tokens_per_layer


def test_a_method_of_the_cache_alone_ranks_nothing_under_another_budget(tiny_model):
    """``scorer="snapkv"`` pruned by recency, and the trace said so."""
    model = tiny_model()
    for given in (CONFIG, "1.5x", "fastkv"):
        with pytest.raises(ValueError, match=r"scorer=snapkv .*no order: .*token_pruning\(model, 'snapkv'\)"):
            _trace(model, given, "snapkv")
    assert _trace(model, methods.get("snapkv", tokens=40), "snapkv").scorer == "snapkv"


def test_a_prompt_too_short_for_a_speed_up_is_pruned_as_far_as_it_can_be_and_says_so(tiny_model):
    """A chat question of 30 tokens ended in an error, and so did a batch with one such row."""
    model = tiny_model(num_hidden_layers=12)
    prompt = torch.arange(3, 27)[None]
    with (
        pytest.warns(UserWarning, match=r"24 tokens is too short for '2x': .* stay .*, 1\.\d\dx fewer FLOPs") as said,
        token_pruning(model, "2x", scorers.recency()) as trace,
    ):
        for _ in range(2):
            model.generate(prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert len(said) == 1 and trace.tokens_per_layer[-1] == 20
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :4] = 0  # this row is left whole
    with (
        pytest.warns(UserWarning, match="a prompt of 24 tokens is too short for '2x'"),
        token_pruning(model, "2x", scorers.recency()),
    ):
        model(prompt.repeat(2, 1), attention_mask=mask)
    with pytest.raises(budget.SpeedupOutOfReach, match="at most"), token_pruning(model, "90x", scorers.recency()):
        model(prompt.repeat(1, 20))


def test_numbers_of_numpy_and_paths_are_taken_as_what_they_say(tiny_model, tmp_path):
    model = tiny_model()
    TokenPruners.for_model(model, (4,)).save_pretrained(tmp_path / "set")
    config = PruningConfig((4,), keep_ratio=0.5)
    with token_pruning(model, config, tmp_path / "set") as trace:
        model(torch.arange(3, 103)[None])
    assert trace.scorer == "learned"
    with token_pruning(model, np.float32(0.8), scorers.recency()) as trace:
        model(torch.arange(3, 103)[None])
    assert trace.tokens_per_layer[-1] == 80
