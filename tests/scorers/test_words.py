"""Long words scored as a whole: what is a word, which score its tokens get, and where their ids come from."""

import re

import pytest
import safetensors.torch
import torch

from sdtp_lib import PruningConfig, token_pruning
from sdtp_lib.provenance import project_root
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.scorers.words import LEAST, LEAST_LATER, MOST, least_at, whole_words, word_table, words_of
from tests.pruning.chunked import needs_chunks
from tests.reference import louder


class Vocabulary:
    """A tokenizer as far as its vocabulary goes."""

    def __init__(self, *pieces, special=()):
        self.pieces, self.all_special_ids = pieces, list(special)

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[number] for number in ids]


@pytest.mark.parametrize(
    ("piece", "kind"),
    [("key", 0), ("-", 0), ("Ġkey", 1), ("▁key", 1), (" key", 1), ("Ċ", 2), ("ĠĠ", 2), (";Ċ", 2), ("<0x0A>", 2),
     ("<0x41>", 0), ("<0xE4>", 2), ("Ã¤", 2), ("中", 2), (None, 2), ("", 2)],
)  # fmt: skip
def test_a_token_continues_a_word_begins_one_or_stands_alone(piece, kind):
    assert word_table(Vocabulary(piece)).tolist() == [kind, 2]


def test_special_tokens_stand_alone_and_what_follows_begins_a_word(tiny_tokenizer):
    table = word_table(tiny_tokenizer)
    ids = tiny_tokenizer("ab 7f39<|im_end|>cd\nef", add_special_tokens=False, return_tensors="pt")["input_ids"]
    words = words_of(ids, torch.arange(ids.shape[1])[None], table)[0].tolist()
    pieces = tiny_tokenizer.convert_ids_to_tokens(ids[0])
    joined = {}
    for piece, word in zip(pieces, words, strict=True):
        joined[word] = joined.get(word, "") + piece
    assert list(joined.values()) == ["ab", " ", "7f39", "<|im_end|>", "cd", "\n", "ef"]


def test_ids_that_the_tokenizer_does_not_have_stand_alone():
    table = word_table(Vocabulary("a", "b"))
    assert words_of(torch.tensor([[0, 1, 2, 900, 0, 1]]), torch.arange(6)[None], table).tolist() == [[0, 0, 1, 2, 3, 3]]


def test_negative_ids_stand_alone_as_others_that_the_tokenizer_does_not_have():
    """They were taken for the first token of the vocabulary."""
    table = word_table(Vocabulary("a", "b"))
    assert words_of(torch.tensor([[0, -1, 1, 0, -200, 1]]), torch.arange(6)[None], table).tolist() == [
        [0, 1, 2, 2, 3, 4]
    ]


def test_pieces_may_be_bytes():
    assert word_table(Vocabulary(b"key", b" key", b"\n", b"\xe4\xb8", None)).tolist() == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("given", [None, "a-folder", 5, object()])
def test_what_is_no_tokenizer_is_refused_and_pruners_stay_as_they_were(given, tiny_model):
    pruners = TokenPruners.for_model(tiny_model(), (1, 3))
    with pytest.raises(ValueError, match=f"tokenizer={type(given).__name__} has no all_special_ids: give a tokenizer"):
        pruners.know_words(given)
    assert pruners.word_table is None


@pytest.mark.parametrize(
    "table",
    [torch.zeros(0, dtype=torch.uint8), torch.rand(9), torch.zeros(3, 3, dtype=torch.uint8),
     torch.tensor(1, dtype=torch.uint8), torch.full((9,), 7, dtype=torch.uint8)],
    ids=["empty", "real", "two axes", "a number", "other kinds"],
)  # fmt: skip
def test_a_damaged_table_of_words_is_refused_when_pruners_are_loaded(table, tiny_model, tiny_tokenizer, tmp_path):
    """One of real numbers was taken silently, others failed in the middle of a prefill."""
    TokenPruners.for_model(tiny_model(), (1, 3)).know_words(tiny_tokenizer).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file({**tensors, "word_table": table}, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="does not fit config.json at its word_table; write both again"):
        TokenPruners.from_pretrained(tmp_path)


def test_tokens_that_were_not_adjacent_in_the_prompt_share_no_word():
    """A chunk's tokens stand beside the query tokens, and what a cut left beside what it left."""
    table = word_table(Vocabulary("a"))
    positions = torch.tensor([[-1, -1, 3, 4, 9, 10, 11]])
    assert words_of(torch.zeros(1, 7, dtype=torch.long), positions, table).tolist() == [[0, 1, 2, 2, 3, 3, 3]]


def test_tokens_of_a_long_word_get_its_mean_in_the_order_of_their_own_and_others_keep_theirs():
    words = torch.tensor([[1, 1, 4, *[5] * LEAST, *[6] * (LEAST - 1), *[9] * (MOST + 1)]])
    scores = torch.randn(words.shape, generator=torch.Generator().manual_seed(0))
    told = whole_words(scores, words, None)
    long = words == 5
    torch.testing.assert_close(told[long], scores[long].mean().expand(LEAST), atol=1e-3, rtol=0)
    assert told[long].argsort().tolist() == scores[long].argsort().tolist()
    assert (told[~long] == scores[~long]).all()


def test_padding_belongs_to_no_word():
    words, scores = torch.full((1, LEAST + 2), 3), torch.arange(LEAST + 2.0)[None]
    valid = torch.arange(LEAST + 2)[None] >= 2
    told = whole_words(scores.masked_fill(~valid, torch.nan), words, valid)
    mean = torch.arange(2.0, LEAST + 2).mean()
    torch.testing.assert_close(told[0, 2:], mean.expand(LEAST), atol=1e-3, rtol=0)


@pytest.mark.parametrize("lengths", [(60,), (60, 41)])
def test_a_stage_knows_the_ids_of_its_kept_tokens(tiny_model, lengths):
    model, seen = tiny_model(), []
    ids = torch.randint(3, 120, (len(lengths), 60), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * (60 - length) + [1] * length for length in lengths])

    def scorer(stage):
        seen.append((stage.token_ids, stage.positions))
        return stage.hidden_states.norm(dim=-1)

    with token_pruning(model, PruningConfig((1, 3), 0.6, min_local_tokens=4), scorer), torch.no_grad():
        model(ids, attention_mask=mask)
        embeddings = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeddings, attention_mask=mask)
    for told, positions in seen[:2]:
        for row, length in enumerate(lengths):
            real = positions[row] >= 0
            assert (told[row, real] == ids[row, 60 - length :][positions[row, real]]).all()
    assert len(seen) == 4 and seen[2][0] is None, "embeddings have no ids"


def test_pruners_that_know_words_say_so_when_saved_and_keep_a_long_word_whole(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    torch.manual_seed(0)
    pruners = TokenPruners.for_model(model, (1, 3)).eval()
    before = pruners.identity
    pruners.know_words(tiny_tokenizer).save_pretrained(tmp_path)
    loaded = TokenPruners.from_pretrained(tmp_path)
    assert loaded.identity == pruners.identity != before
    assert (loaded.word_table == word_table(tiny_tokenizer)).all()
    text = " ".join(["all was well on board and in the hold"] * 3) + " key-7f39c4d1b20e " + "so they sailed on " * 4
    ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    word = words_of(ids, torch.arange(ids.shape[1])[None], loaded.word_table)[0]
    longest = word == word.mode().values
    assert int(longest.sum()) >= 15
    config = PruningConfig((1, 3), 0.5, min_local_tokens=4)

    def spread(scorer):
        with token_pruning(model, config, scorer) as trace, torch.no_grad():
            model(ids)
        scores = trace.scores[1][0][longest]
        return float(scores.max() - scores.min())

    with pytest.raises(RuntimeError, match="word_table"):
        loaded.load_state_dict(TokenPruners.for_model(model, (1, 3)).state_dict())
    whole = spread(loaded)
    loaded.word_table = None
    assert whole < 0.01 * spread(loaded)


def test_a_word_that_a_cut_went_through_is_one_at_later_stages_too(tiny_model, tiny_tokenizer):
    """Its tokens stand with gaps between them then: words are those of the whole prompt."""
    model = louder(tiny_model())
    torch.manual_seed(0)
    pruners = TokenPruners.for_model(model, (1, 3)).eval().know_words(tiny_tokenizer)
    text = " and so " + "7f39c4d1b20e-55x8q1w9z0k4m2n6p3r5t7v" + " is it" * 3
    ids = tiny_tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    word = words_of(ids, torch.arange(ids.shape[1])[None], pruners.word_table)[0]
    of_the_word = word == word.mode().values
    with token_pruning(model, PruningConfig((1, 3), 0.6, min_local_tokens=4), pruners) as trace, torch.no_grad():
        model(ids)
    left = trace.scored_positions[3][0]
    inside = of_the_word[left]
    assert LEAST_LATER <= int(inside.sum()) < int(of_the_word.sum()), "nothing to test"
    assert (left[inside].diff() > 1).any(), "nothing to test"
    scores = trace.scores[3][0]
    assert scores[inside].max() - scores[inside].min() < 1e-3 * scores.std()


def test_scores_that_are_read_after_the_caller_filled_its_ids_anew_are_of_the_prompt(tiny_model, tiny_tokenizer):
    model = louder(tiny_model())
    torch.manual_seed(0)
    pruners = TokenPruners.for_model(model, (1, 3)).eval().know_words(tiny_tokenizer)
    ids = tiny_tokenizer("so 7f39c4d1b20e-55x8q1w9 it", add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ]

    def scores(after):
        given = ids.clone()
        with token_pruning(model, PruningConfig((1, 3), 1.0), pruners) as trace, torch.no_grad():
            model(given)
        after(given)
        return trace.scores[1]

    assert torch.equal(scores(lambda given: given.fill_(8)), scores(lambda given: None))


def test_the_lengths_of_a_long_word_are_those_that_readers_are_told_and_part_of_the_identity(tiny_model, monkeypatch):
    assert (LEAST, LEAST_LATER, MOST) == (6, 12, 64)
    assert [least_at(layer, (4, 7, 10)) for layer in (4, 7, 10)] == [6, 6, 12]
    for document in ("docs/method.md", "sdtp_lib/shipped_pruners/smollm2-135m-instruct/README.md"):
        text = (project_root() / document).read_text()
        told = rf"{LEAST} to {MOST} tokens \(from {LEAST_LATER} on in the later half of the stages\)"
        assert re.search(told, " ".join(text.split())), document
    pruners = TokenPruners.for_model(tiny_model(), (1, 3)).know_words(Vocabulary("a"))
    before = pruners.identity
    monkeypatch.setattr("sdtp_lib.scorers.token_pruners.LEAST_LATER", LEAST_LATER + 1)
    assert pruners.identity != before, "rows of other lengths are of another scorer"


@needs_chunks
def test_chunks_of_a_prompt_have_their_own_ids(tiny_model):
    model, seen = tiny_model(), []
    ids = torch.randint(3, 120, (1, 90), generator=torch.Generator().manual_seed(0))

    def scorer(stage):
        seen.append((stage.token_ids, stage.positions))
        return stage.hidden_states.norm(dim=-1)

    with token_pruning(model, PruningConfig((1, 3), 0.6, min_local_tokens=4), scorer):
        model.generate(ids, max_new_tokens=1, prefill_chunk_size=40, do_sample=False)
    assert len(seen) >= 6
    for told, positions in seen:
        assert (told[0] == ids[0, positions[0]]).all()
