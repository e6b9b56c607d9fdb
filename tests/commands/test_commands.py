"""The command line on a tiny model: what a person types, what is printed, and every error as one sentence."""

from __future__ import annotations

import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdtp_lib import PruningConfig, TokenPruners, models
from sdtp_lib.__main__ import COMMANDS, main
from sdtp_lib.commands import train
from sdtp_lib.records import RowWriter
from sdtp_lib.training import recipes, run

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the rain in the plain stays on the mainland, it is said, and so on. " * 4


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A model of one's own in a folder."""
    folder = tmp_path_factory.mktemp("models") / "mine"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Commands write here, and find no pruners that somebody trained on this machine."""
    monkeypatch.setenv("SDTP_PRUNERS", str(tmp_path / "pruners"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pruners"


@pytest.fixture
def prompts(tmp_path):
    """A text, and a file with a prompt in each of the usual forms."""
    (tmp_path / "report.txt").write_text(TEXT)
    records = [
        {"instruction": "what stays?", "context": TEXT, "response": "the rain"},
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "no"}]},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    return [str(tmp_path / "report.txt"), str(tmp_path / "mine.jsonl")]


def said(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    text = said(capsys, "--help")
    assert text == said(capsys), "no command at all asks for help"
    assert all(re.search(rf"^  {name} +\w", text, re.M) for name in COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["pruners"]], ids=str)
def test_help_loads_no_torch(arguments):
    program = (
        "import sys\nfrom sdtp_lib.__main__ import main\n"
        f"try: main({arguments})\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: ") or arguments == ["pruners"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_defaults(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and f"sdtp_lib {name} [-h]" in text and "(default: default)" in text
    assert "None)" not in text and "[])" not in text


# --- train -----------------------------------------------------------------------------------------------------------


def test_help_of_train_names_the_recipes_and_defaults_of_training_itself():
    defaults = {name: one.default for name, one in inspect.signature(run.train_by_recipe).parameters.items()}
    given = vars(train.parser().parse_args(["MODEL"]))
    assert list(train.RECIPES) == list(recipes.RECIPES)
    text = " ".join(train.parser().format_help().split())
    assert "of prompts, order and weights (default: 0)" in text and "(default: 0.0)" in text, "0 is a default too"
    shared = sorted(given.keys() & defaults.keys() - {"model"})
    assert len(shared) == 15 and {name: given[name] for name in shared} == {name: defaults[name] for name in shared}


def test_train_loads_the_model_as_the_other_commands_do(folder, monkeypatch):
    loaded = {}
    monkeypatch.setattr(models, "load_model", lambda name, **how: (loaded.update(how, name=name), "tokenizer"))
    monkeypatch.setattr(run, "train_by_recipe", lambda *_, **options: loaded.update(recipe=options["recipe"]))
    how = ["--device", "cpu", "--attn-implementation", "eager", "--trust-remote-code", "--dtype", "bfloat16"]
    assert main(["train", str(folder), *how]) == 0
    assert loaded == {
        "name": str(folder), "device": "cpu", "attn_implementation": "eager", "trust_remote_code": True,
        "dtype": "bfloat16", "recipe": "sdtp",
    }  # fmt: skip


def test_a_device_beside_a_launcher_is_refused_since_each_process_has_its_own(folder, monkeypatch, capsys):
    monkeypatch.setattr("sdtp_lib.processes.Share", lambda: SimpleNamespace(device=torch.device("cuda", 1)))
    assert main(["train", str(folder), "--device", "cuda:0"]) == 2
    assert "error: --device cuda:0: this process of a launch has cuda:1; leave" in capsys.readouterr().err


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_both_answers_with_times_tokens_and_bytes(folder, prompts, capsys):
    text = said(capsys, "generate", folder, "--budget", "1.5x", "--new-tokens", 4, "--scorer", "recency", *prompts)
    assert [re.findall(r"^== (\S+): (\d+) tokens$", text, re.M)[n][0] for n in range(3)] == [
        "report.txt", "mine.jsonl:1", "mine.jsonl:2",
    ]  # fmt: skip
    cost = r"prefill [\d,]+ ms(, \d more tokens at [\d.,]+ ms)?, KV cache of the prompt ([\d.]+) MB$"
    full, pruned = (re.findall(rf"^-- {name}: {cost}", text, re.M) for name in ("unpruned", "pruned"))
    assert len(full) == len(pruned) == 3
    assert all(float(b[1]) < float(a[1]) for a, b in zip(full, pruned, strict=True))
    assert len(re.findall(r"^-- prompt: .*fewer.*scorer: recency$", text, re.M)) == 3


def test_generate_answers_as_the_model_itself_does(folder, tiny_tokenizer, capsys, monkeypatch):
    from sdtp_lib import load_model

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    text = said(capsys, "generate", folder, "-", "--budget", "1.0", "--scorer", "recency", "--new-tokens", 6)
    model, tokenizer = load_model(str(folder))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXT.strip()}], tokenize=False,
                                         add_generation_prompt=True)  # fmt: skip
    inputs = tokenizer(chat, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert f"== standard input: {inputs.input_ids.shape[1]} tokens" in text
    assert text.count(f" MB\n{answer}\n-- ") == 2, "unpruned, and at ratio one"


def test_without_chat_the_bare_text_is_fed(folder, tiny_tokenizer, capsys):
    text = said(capsys, "generate", folder, "--prompt", TEXT, "--no-chat", "--budget", "keep08", "--new-tokens", 1)
    assert f"== --prompt 1: {len(tiny_tokenizer(TEXT.strip()).input_ids)} tokens" in text


# --- compare ---------------------------------------------------------------------------------------------------------


def test_compare_makes_one_table_and_one_picture_of_everything_at_hand(folder, own_folder, prompts, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'study'")
    from sdtp_lib import load_model

    torch.manual_seed(0)
    TokenPruners.for_model(load_model(str(folder))[0], (1, 3)).save_pretrained(own_folder / "trained-here")
    text = said(capsys, "compare", folder, *prompts, "--budget", "1.3x", "--new-tokens", 4, "--repeats", 1,
                "--answers", "--out", "found")  # fmt: skip
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    table = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert {"unpruned", "trained-here", "attention_pooled", "recency", "random"} <= set(table)
    assert table["unpruned"] == {
        "choice": "unpruned", "KL [nats per token]": "0.0000", "same answer": "3 of 3", "speed-up": "1.00x",
        "KV cache": "100%", "prefill [ms]": table["unpruned"]["prefill [ms]"],
    }  # fmt: skip
    assert all(int(line["KV cache"].rstrip("%")) < 100 for name, line in table.items() if name in ("recency", "random"))
    assert "-- report.txt, unpruned:" in text
    assert "\nspecprefill: without a draft model, which is not the paper's method" in text
    told = "\nfastkv: at a wanted speed-up its cut is scaled and its own KV budget is not"
    assert told in text, "every method here is scaled, and its table line is read beside 10 % of the keys"
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [
        "compare.json", "compare.md", "compare.png", "rows.json",
    ]  # fmt: skip
    assert (tmp_path / "found" / "compare.md").read_text() in text
    rows = json.loads((tmp_path / "found" / "rows.json").read_text())
    refused = {row["choice"] for row in rows["rows"] if "refused" in row}
    assert rows["provenance"]["model"] == str(folder) and len(rows["rows"]) == 3 * len({*table, *refused})
    assert all(f"{name}:" in text for name in refused), "what a method cannot do is said"
    assert all(row["kl_nats"] > 0 for row in rows["rows"] if row["kind"] == "training-free")


@pytest.mark.parametrize("command", [("compare", "no/such/model", "--prompt", TEXT), ("bench", "no/such/model")])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "taken").write_text("mine")
    for out in ("taken", "taken/below"):
        assert main([*command, "--out", out]) == 2
        assert re.search(rf"^error: --out {out}: .*: name another folder\.$", capsys.readouterr().err, re.M)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_picture_of_an_earlier_comparison_goes_where_the_new_one_draws_none(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'study'")
    out = tmp_path / "sdtp-compare"
    short = ("compare", folder, "--new-tokens", 2, "--repeats", 1, "--only", "recency")
    first = said(capsys, *short, "--prompt", TEXT, "--budget", "1.3x")
    assert first.splitlines()[-1] == "table, picture and rows: sdtp-compare"
    (out / "notes.txt").write_text("mine")
    # A prompt too short for the budget: nothing is left to draw.
    second = said(capsys, *short, "--prompt", "so it is said in the rain of it", "--budget", "3x")
    assert second.splitlines()[-1] == "table and rows: sdtp-compare"
    assert {path.name for path in out.iterdir()} == {"compare.md", "rows.json", "notes.txt"}


def test_progress_counts_the_timed_repetitions_and_ends_when_they_do(folder, monkeypatch):
    from sdtp_lib import load_model
    from sdtp_lib.latency import side_by_side as compared

    model, _ = load_model(str(folder))
    found = [choice for choice in compared.choices(model, "1.3x") if choice.name in ("recency", "random")]
    told = []
    timed = compared._prefill_ms
    monkeypatch.setattr(compared, "_prefill_ms", lambda *given: (told.append("timed"), timed(*given))[1])
    prompts = {"one": list(range(6, 106)), "two": list(range(6, 116))}
    compared.side_by_side(model, prompts, "1.3x", found, new_tokens=2, repeats=3, progress=told.append)
    steps = [text for text in told if text != "timed"]
    assert len(steps) == compared.steps(prompts, found, 3) == 2 * (2 + 3)
    assert steps[2:5] == [f"one: timed prefills, {turn} of 3" for turn in (1, 2, 3)]
    assert told[2:6] == [steps[2], *["timed"] * 3], "told before its prefills, the unpruned one among them"


def test_the_bar_is_not_full_while_anything_is_measured(folder, monkeypatch):
    import tqdm as bars

    seen, made = [], []
    from sdtp_lib.latency import side_by_side as compared

    class Bar(bars.tqdm):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            made.append(self)

    timed = compared._prefill_ms
    monkeypatch.setattr(bars, "tqdm", Bar)
    monkeypatch.setattr(compared, "_prefill_ms", lambda *given: (seen.append(made[0].n), timed(*given))[1])
    assert main(["compare", str(folder), "--prompt", TEXT, "--budget", "1.3x", "--only", "recency",
                 "--new-tokens", "2", "--repeats", "2"]) == 0  # fmt: skip
    assert made[0].total == 3 and seen == [1, 1, 2, 2], "one choice and two repetitions, those done when each is timed"


def test_all_choices_cost_the_same_flops(folder):
    from sdtp_lib import budget, load_model
    from sdtp_lib.latency.side_by_side import choices
    from sdtp_lib.model_shape import ModelShape

    model, _ = load_model(str(folder))
    shape = ModelShape.from_model(model)
    full = budget.prefill_flops(shape, [400] * 6)
    ids = torch.randint(6, 120, (1, 400), generator=torch.Generator().manual_seed(0))
    for said_budget, wanted in (("1.4x", 1.4), ("keep08", None)):
        reached = {}
        for choice in choices(model, said_budget):
            if choice.kind != "method":
                with torch.no_grad(), choice.at(model, said_budget, 400).applied(model) as trace:
                    model(input_ids=ids)
                reached[choice.name] = full / budget.prefill_flops(shape, trace.tokens_per_layer)
        assert max(reached.values()) - min(reached.values()) < 0.02
        config = PruningConfig.preset("keep08", 6)
        wanted = wanted or budget.speedup_limit(shape, config, 400, pruner_width=0)
        assert reached["recency"] == pytest.approx(wanted, abs=0.02)


def test_what_refuses_a_prompt_is_left_out_with_its_reason(folder, capsys):
    text = said(capsys, "compare", folder, "--prompt", "so it is said in the rain of it", "--budget", "3x",
                "--only", "recency", "--new-tokens", 2, "--repeats", 1)  # fmt: skip
    assert re.search(r"^Left out: recency: budget='3x': a prompt of \d+ tokens can be prefilled at most", text, re.M)


# --- bench, pruners --------------------------------------------------------------------------------------------------


def test_bench_times_presets_and_lengths_and_goes_on_where_it_stopped(folder, capsys, tmp_path):
    arguments = ("bench", folder, "--presets", "keep08", "--lengths", 128, 256, "--new-tokens", 3, "--repeats", 1)
    text = said(capsys, *arguments)
    assert "scorer: attention, pooled (no pruners were made for this model's weights)" in text
    cells = [("128", "unpruned"), ("128", "keep08"), ("256", "unpruned"), ("256", "keep08")]
    assert re.findall(r"^\| (\d+) \| (\w+) \| [\d.,]+ ", text, re.M) == 2 * cells  # times, then FLOPs and bytes
    rows = (tmp_path / "sdtp-bench" / "bench.jsonl").read_bytes()
    assert said(capsys, *arguments) == text and (tmp_path / "sdtp-bench" / "bench.jsonl").read_bytes() == rows


def test_bench_shows_the_lengths_and_new_tokens_that_were_asked_for_and_keeps_the_others(folder, capsys):
    arguments = ("bench", folder, "--scorer", "recency", "--repeats", 2, "--lengths")
    assert "not shown" not in said(capsys, *arguments, 64, "--new-tokens", 2, "--presets", "keep09")
    text = said(capsys, *arguments, 64, "--new-tokens", 3, "--presets", "keep08")
    assert re.findall(r"^\| (\d+) \| (\w+) ", text, re.M) == 2 * [("64", "unpruned"), ("64", "keep08")]
    assert "batch 1, 3 new tokens" in text and "(4 more there, of other prompt lengths or numbers of new" in text


def test_verify_tells_the_differences_and_what_rounding_explains(folder, capsys):
    text = said(capsys, "verify", folder, "--repeats", 3)
    assert re.match(r"LlamaForCausalLM with sdpa: (not )?in this release's list .*transformers 5", text)
    figures = re.search(r"difference (\S+) in prefill and (\S+) in decode, .* (\S+) \(", text).groups()
    prefill, decode, most = map(float, figures)
    assert 0 < max(prefill, decode) < most and re.search(r"^median of 3: \d\.\d\d s", text, re.M)


def test_verify_refuses_a_model_whose_dropped_tokens_are_still_seen(folder, capsys, monkeypatch):
    from sdtp_lib.pruning import verify

    given = verify.masked_forward
    monkeypatch.setattr(verify, "masked_forward", lambda model, tokens, _kept, *rest, **more: given(
        model, tokens, {3: verify.torch.arange(tokens.shape[1])}, *rest, **more))  # fmt: skip
    assert main(["verify", str(folder)]) == 2
    assert "did not pass the check that pruning is exact" in capsys.readouterr().err


def test_pruners_says_what_is_at_hand_and_for_which_weights(folder, own_folder, capsys):
    from sdtp_lib import load_model

    text = said(capsys, "pruners")
    assert text.startswith("smollm2-135m-instruct  (ships: ") and "score before layers 4, 7, 10" in text
    assert "which does not exist yet" in text and "made for" not in text
    TokenPruners.for_model(load_model(str(folder))[0], (1, 3)).save_pretrained(own_folder / "trained-here")
    (own_folder / "broken").mkdir()
    (own_folder / "broken" / "config.json").write_text('{"model_type"')
    text = said(capsys, "pruners", folder)
    blocks = dict(re.findall(r"^(\S+)  \((?:ships|yours): .*\)\n((?:  .*\n)+)", text, re.M))
    assert f"  made for {folder} (weights " in blocks["trained-here"]
    assert f"  not made for {folder}" in blocks["smollm2-135m-instruct"]
    assert "cannot be read" in blocks["broken"]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "'trian' is no command: choose among"),
        (["generate", "MODEL"], "there is no prompt: name a file"),
        (["generate", "MODEL", "nowhere.txt"], r"nowhere.txt cannot be read \(No such file"),
        (["generate", "MODEL", "."], "is a folder: name a text"),
        (["generate", "MODEL", "--prompt", " "], "--prompt 1 is empty"),
        (["generate", "no/such/folder", "--prompt", "x"], "Cannot load 'no/such/folder': no config.json there"),
        (["generate", "MODEL", "--prompt", TEXT, "--budget", "keep8"], "budget='keep8' is unknown: give keep09"),
        (["generate", "MODEL", "--prompt", TEXT, "--budget", "1.5"], r"keep_ratio=1.5 is outside"),
        (["generate", "MODEL", "--prompt", TEXT, "--budget", "fastkv@2x"], "--budget fastkv@2x is a method: give it"),
        (["compare", "MODEL", "--prompt", TEXT, "--budget", "fastkv"], "--budget fastkv is a method: give it by --me"),
        (["generate", "MODEL", "--prompt", TEXT, "--scorer", "recent"], "scorer='recent' is unknown: give one of"),
        (["generate", "MODEL", "--prompt", TEXT, "--scorer", "./none"], "scorer='./none' is unknown|no such folder"),
        (["generate", "MODEL", "--prompt", TEXT, "--dtype", "int3"], "dtype='int3' is unknown"),
        (["generate", "MODEL", "--prompt", TEXT * 3], r"--prompt 1: \d+ prompt and 128 new tokens are more than"),
        (["generate", "MODEL", "bad.jsonl"], "bad.jsonl, line 2"),
        (["generate", "MODEL", "empty.jsonl"], "empty.jsonl is empty"),
        (["generate", "MODEL", "lacks.jsonl"], r"lacks.jsonl:1 has no prompt \(fields: answer\)"),
        (["compare", "MODEL", "--prompt", TEXT, "--only", "recent"], "--only recent: there are random, uniform"),
        (["bench", "MODEL", "--presets", "keep8"], "--presets keep8: choose among keep09"),
        (["pruners", "no/such/folder"], "Cannot load 'no/such/folder'"),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence_and_exit_code_two(folder, arguments, sentence, capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "lacks.jsonl").write_text('{"answer": "a"}\n')
    assert main([str(folder) if argument == "MODEL" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: .*(?:{sentence})", error), error
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert error.rpartition("error: ")[2].count("\n") == 1


def test_a_folder_that_another_run_writes_is_said_in_one_sentence(folder, capsys, tmp_path):
    with RowWriter(tmp_path / "sdtp-bench" / "bench.jsonl", {}):
        assert main(["bench", str(folder), "--lengths", "64", "--repeats", "1", "--scorer", "recency"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: bench.jsonl is being written by process \d+ on .*a folder of its own.$", error, re.M)


def test_a_fault_of_ours_is_not_hidden(folder, monkeypatch):
    from sdtp_lib.commands import generate

    monkeypatch.setattr(generate, "main", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        main(["generate", str(folder)])


# --- methods ---------------------------------------------------------------------------------------------------------


def test_generate_answers_with_a_published_method_at_its_own_budget_or_a_speedup(folder, prompts, capsys):
    text = said(capsys, "generate", folder, prompts[0], "--method", "lazyllm@1.5x", "--new-tokens", "3")
    assert "-- lazyllm@1.5x: prefill" in text and "scorer: lazyllm" in text and "(1.5" in text
    own = said(capsys, "generate", folder, prompts[0], "--method", "fastkv", "--new-tokens", "3")
    assert "-- fastkv: prefill" in own and "scorer: fastkv" in own


@pytest.mark.parametrize("text", ["fastkvv", "fastkv@fast", "snapkv@2x"])
def test_a_method_that_is_not_there_or_cannot_be_so_fast_is_refused_before_a_model_is_loaded(text, prompts, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "no/such/model", prompts[0], "--method", text])
    assert "--method" in capsys.readouterr().err


def test_a_budget_beside_a_method_is_refused_and_not_passed_over(prompts, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "no/such/model", prompts[0], "--budget", "3x", "--method", "fastkv"])
    assert "argument --method: not allowed with argument --budget" in capsys.readouterr().err


def test_bench_times_a_published_method_in_turn_with_the_presets(folder, tmp_path, capsys):
    arguments = ["--presets", "keep09", "--method", "lazyllm@1.5x", "--lengths", "64", "--repeats", "1"]
    arguments += ["--new-tokens", "2", "--scorer", "recency", "--out", tmp_path / "b"]
    text = said(capsys, "bench", folder, *arguments)
    assert "lazyllm@1.5x" in text and "keep09" in text


def test_bench_refuses_lengths_beyond_the_models_positions(folder, capsys, tmp_path):
    assert main(["bench", str(folder), "--lengths", "64", "510", "--new-tokens", "4", "--out", str(tmp_path)]) == 2
    assert "--lengths 510 with --new-tokens 4 is more than the model's 512 positions" in capsys.readouterr().err
