"""The lm-eval adapter: equal to lm-eval's own HF model at ratio 1.0, batched, and pruned where it says so."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sdtp_lib import harness, methods, scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.evaluation.divergence import continuation_logits
from sdtp_lib.harness import SDTPLM
from sdtp_lib.methods.call import token_pruning
from tests.evaluation.multimodal import multimodal_model

# One of the contexts is a single token: a prefill, and said to be short.
pytestmark = pytest.mark.filterwarnings("ignore:the prompt of 1 tokens is too short")

CONFIG = PruningConfig(layers=(2, 4), keep_ratio=0.6, min_local_tokens=4)
CONTEXTS = [
    "the rain in the plain stays on the mainland, it is said, and so on and on it goes",
    "another tale of it",
    "x",
]
CHOICES = [" at once", " no", " in the end of it all"]


def requests(kind="loglikelihood"):
    if kind == "loglikelihood":
        pairs = [(context, choice) for context in CONTEXTS for choice in CHOICES] + [("", "it is")]
    elif kind == "generate_until":
        pairs = [(context, {"until": ["zz"], "max_gen_toks": 6, "do_sample": False}) for context in CONTEXTS[:2]]
    else:
        pairs = [(context,) for context in CONTEXTS]
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=number, metadata=("tiny", number, 1))
        for number, pair in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def plain(model, tiny_tokenizer):
    return HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1)


def pruned(model, tokenizer, **options):
    options = {"pruning": CONFIG, "scorer": scorers.recency(), "batch_size": 1} | options
    return SDTPLM(pretrained=model, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ratio_one_gives_lm_evals_own_loglikelihoods_item_by_item(model, tiny_tokenizer, plain, batch_size):
    whole = pruned(model, tiny_tokenizer, pruning=CONFIG.replace(keep_ratio=1.0), batch_size=batch_size)
    ours = whole.loglikelihood(requests(), disable_tqdm=True)
    theirs = plain.loglikelihood(requests(), disable_tqdm=True)
    assert len(ours) == len(theirs) == 10
    for (our_value, our_greedy), (their_value, their_greedy) in zip(ours, theirs, strict=True):
        assert our_value == pytest.approx(their_value, abs=1e-4)
        assert our_greedy == their_greedy


def test_a_pruned_loglikelihood_is_read_from_the_pruned_cache(model, tiny_tokenizer):
    harness = pruned(model, tiny_tokenizer)
    (value, _), *_ = harness.loglikelihood(requests(), disable_tqdm=True)
    context, continuation = harness._encode_pair(CONTEXTS[0], CHOICES[0])
    logits, trace = continuation_logits(model, context, continuation, CONFIG, scorers.recency())
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
    assert value == pytest.approx(expected, abs=1e-4)
    assert trace.tokens_per_layer[-1] < len(context)


def test_batches_of_unequal_contexts_give_the_scores_of_single_ones(model, tiny_tokenizer):
    single = pruned(model, tiny_tokenizer).loglikelihood(requests(), disable_tqdm=True)
    batched = pruned(model, tiny_tokenizer, batch_size=4).loglikelihood(requests(), disable_tqdm=True)
    assert [value for value, _ in batched] == pytest.approx([value for value, _ in single], abs=1e-4)


def test_choices_of_one_context_share_one_prefill(model, tiny_tokenizer):
    harness = pruned(model, tiny_tokenizer)
    prefills = []
    original = harness._score
    harness._score = lambda contexts, options: prefills.append(len(contexts)) or original(contexts, options)
    harness.loglikelihood(requests(), disable_tqdm=True)
    assert sum(prefills) == len(CONTEXTS) + 1


def test_generation_runs_through_the_engine_and_at_ratio_one_as_lm_eval_does(model, tiny_tokenizer, plain):
    asked = requests("generate_until")
    theirs = plain.generate_until(asked, disable_tqdm=True)
    whole = pruned(model, tiny_tokenizer, pruning=CONFIG.replace(keep_ratio=1.0))
    assert whole.generate_until(asked, disable_tqdm=True) == theirs
    harness = pruned(model, tiny_tokenizer)
    harness.generate_until(asked[:1], disable_tqdm=True)
    layers = harness.last_trace.tokens_per_layer
    assert layers[-1] < layers[0] == len(tiny_tokenizer(CONTEXTS[0])["input_ids"])


def test_rolling_loglikelihood_is_unpruned_and_says_so(model, tiny_tokenizer, plain, caplog):
    theirs = plain.loglikelihood_rolling(requests("loglikelihood_rolling"), disable_tqdm=True)
    with caplog.at_level(logging.WARNING, logger="sdtp_lib.harness"):
        ours = pruned(model, tiny_tokenizer).loglikelihood_rolling(requests("loglikelihood_rolling"), disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert "unpruned" in caplog.text


def test_without_pruning_it_is_lm_evals_model(model, tiny_tokenizer, plain):
    neither = SDTPLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1)
    assert neither.loglikelihood(requests(), disable_tqdm=True) == plain.loglikelihood(requests(), disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning": CONFIG, "preset": "keep09", "scorer": "recency"}, "preset='keep09' and pruning"),
        ({"scorer": "recency"}, "nothing to prune: give a preset or pruning"),
        ({"pruners": "x"}, "nothing to prune: give a preset or pruning"),
        ({"preset": "keep06"}, "preset='keep06' is unknown"),
        ({"pruning": "keep06"}, "budget='keep06' is unknown"),
        ({"pruning": "0.5x"}, "budget='0.5x' would be slower"),
        ({"pruning": "fastkv@1.5x"}, "pruning=fastkv@1.5x is a method: give it as method"),
        ({"pruning": methods.get("fastkv")}, "is a method: give it as method"),
        ({"pruning": CONFIG, "scorer": "recent"}, "scorer='recent' is unknown"),
        ({"pruning": CONFIG, "scorer": "recency", "pruners": "x"}, "exclude each other"),
    ],
)
def test_contradicting_arguments_are_refused(model, tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        SDTPLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1, **options)


def test_a_budget_that_no_model_can_have_is_refused_before_one_is_loaded(monkeypatch):
    monkeypatch.setattr(harness, "load_model", lambda *_, **__: pytest.fail("loaded"))
    for wrong in ({"preset": "keep06"}, {"pruning": "keep06"}, {"scorer": "recency"}):
        with pytest.raises(ValueError, match="unknown|nothing to prune"):
            SDTPLM(pretrained="embedded", **wrong)


@pytest.mark.parametrize("budget", [{"pruning": CONFIG}, {"pruning": "1.5x"}], ids=["config", "speed-up"])
def test_without_a_scorer_it_is_the_one_that_token_pruning_takes(tiny_model, tiny_tokenizer, budget):
    """It was an error, though the one call chooses for itself."""
    model = tiny_model()  # of its own: what was chosen is said once per model
    with pytest.warns(UserWarning, match="scored by the pooled attention"):
        by_itself = SDTPLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1, **budget)
    by_itself.loglikelihood(requests()[: len(CHOICES)], disable_tqdm=True)
    ids = torch.tensor([tiny_tokenizer(CONTEXTS[0])["input_ids"]])
    with torch.no_grad(), token_pruning(model, budget["pruning"]) as trace:
        model(ids)
    assert by_itself.last_trace.scorer == trace.scorer
    assert by_itself.last_trace.tokens_per_layer[-1] < by_itself.last_trace.tokens_per_layer[0]


@pytest.mark.embedded
def test_a_mistake_in_model_args_ends_the_command_with_a_sentence():
    """lm-eval's own program shows the stack of it."""
    given = ["run", "--model", "sdtp", "--model_args", "pretrained=embedded,preset=keep06", "--tasks", "lambada_openai"]
    started = [sys.executable, "-m", "sdtp_lib.harness", *given]
    ended = subprocess.run(started, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.rstrip().splitlines()[-1].startswith("error: preset='keep06' is unknown: choose one of keep09")


def test_the_command_line_knows_the_model():
    from lm_eval.api.registry import get_model

    assert get_model("sdtp") is SDTPLM


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []], ids=str)
def test_help_is_ours_and_tells_what_model_args_may_hold(arguments, capsys):
    harness.main(arguments)
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m sdtp_lib.harness run --model sdtp")
    parameters = set(inspect.signature(SDTPLM).parameters) - {"tokenizer", "kwargs"}
    told = set(re.findall(r"^  (\w+)=", text, re.M))
    assert told == parameters
    assert all(name in text for name in (*harness._LOADER_OPTIONS, *harness.NAMED))
    assert "run --help" in text


def test_a_published_method_brings_its_budget_and_its_scorer(tiny_model, tiny_tokenizer):
    model = tiny_model()
    ours = SDTPLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1, method="lazyllm@1.5x")
    ours.loglikelihood(requests()[:1], disable_tqdm=True)
    assert ours.last_trace.tokens_per_layer[-1] < ours.last_trace.tokens_per_layer[0]
    assert ours.scorer.name == "lazyllm"
    with pytest.raises(ValueError, match="brings its budget"):
        SDTPLM(pretrained=model, tokenizer=tiny_tokenizer, method="lazyllm", scorer="recency")
    with pytest.raises(ValueError, match="method=5 is no text: give a name"):
        SDTPLM(pretrained=model, tokenizer=tiny_tokenizer, method=5)


@pytest.fixture
def as_lm_eval_makes_it(tiny_model, tiny_tokenizer, tmp_path):
    """``as_lm_eval_makes_it(device)``: the model of ``--model sdtp --model_args pretrained=FOLDER,...``."""
    from lm_eval.api.registry import get_model

    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    harness._say_once.cache_clear()
    arguments = f"pretrained={tmp_path},preset=keep09,scorer=recency"
    return lambda device: get_model("sdtp").create_from_arg_string(
        arguments, {"batch_size": 1, "max_batch_size": None, "device": device}
    )


def test_without_a_gpu_lm_evals_own_device_is_the_cpu_which_is_said_once(as_lm_eval_makes_it, monkeypatch, capsys):
    """It was an error that asked to leave out what had been left out: lm-eval fills in cuda:0 on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for _ in range(2):
        ours = as_lm_eval_makes_it("cuda:0")
    assert ours.device.type == "cpu" and len(ours.loglikelihood(requests()[:1], disable_tqdm=True)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == 1 and "device='cuda:0'" in said[0] and "runs on the CPU" in said[0]
    harness._say_once.cache_clear()
    assert as_lm_eval_makes_it("cpu").device.type == "cpu" and as_lm_eval_makes_it(None).device.type == "cpu"
    assert "note: " not in capsys.readouterr().err


def test_each_of_several_processes_has_the_gpu_of_its_own_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [harness._device_for(asked) for asked in ("cuda:0", "cuda:1", None)] == ["cuda:0", "cuda:1", None]
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, own in enumerate(["cuda:0", "cuda:1", "cuda:0", "cuda:1"]):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert harness._device_for("cuda:0") == harness._device_for(None) == own
    assert harness._device_for("cpu") == "cpu"


def test_a_preset_is_made_for_the_layers_of_a_model_inside_a_multimodal_one(tiny_tokenizer):
    model = multimodal_model()
    ours = SDTPLM(pretrained=model, tokenizer=tiny_tokenizer, preset="keep09", scorer="recency", batch_size=1)
    layers = model.config.get_text_config().num_hidden_layers
    assert ours.pruning == PruningConfig.preset("keep09", num_layers=layers)
    assert len(ours.loglikelihood(requests()[:1], disable_tqdm=True)) == 1
