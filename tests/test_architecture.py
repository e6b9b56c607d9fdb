"""The library's shape: who may import whom, one door to transformers' internals, an import that changes nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest

import sdtp_lib

PACKAGE = Path(__file__).resolve().parent.parent / "sdtp_lib"

# From the ground up. A part is a folder, or a module beside the folders; it may import parts of lower floors only.
FLOORS = (
    {"extras", "layer_shape", "load_failures", "provenance", "shipped"},
    {"models", "model_shape", "config", "files"},
    {"records", "budget", "architectures"},
    {"data", "pruning", "processes"},
    {"scorers"},
    {"methods", "views", "plots"},
    {"explorer", "harness"},
    {"evaluation"},
    {"training"},
    {"latency"},
    {"paper"},
    {"commands"},
    {"__main__"},
)
# The same within a folder, module by module. Its `__init__` stands on top and imports nothing from outside but extras.
INSIDE = {
    "architectures": ({"caches", "masks", "unsupported", "attention_interface"}, {"layers"},
                      {"bias_probe", "attention_weights"}, {"attention_bias", "attention_readings"}),
    "data": ({"texts", "lm_eval_files"}, {"samples", "ruler_texts", "prompts"},
             {"tasks", "longbench", "ruler_generators", "own_records"},
             {"ruler", "test_sets", "longbench2", "copying", "training_mix"}),
    "pruning": ({"selection", "token_fates", "stage", "trace", "generate_guard", "pruned_cache", "protection",
                 "masked_reference"}, {"continuation", "verify", "kv_budget"}, {"prefill"}, {"second_pass"},
                {"session"}, {"engine"}),
    "scorers": ({"blend", "pruner_files"}, {"simple", "stage_network"}, {"token_pruners"}, {"by_name", "found"}),
    "methods": ({"votes", "method"}, {"sdtp", "lazyllm", "gemfilter", "fastkv", "claa", "sliminfer",
                "uniprefill", "asl", "pyramidinfer", "streamingllm", "specprefill"}, {"snapkv", "earlier_scheme"},
                {"h2o"}, {"registry"}, {"call"}),
    "views": ({"looks"}, {"tokens", "layer_map"}),
    "plots": ({"style", "readings"}, {"cost", "needles", "results", "tokens"}, {"text"}),
    "explorer": ({"state", "typed"}, {"live_html", "page", "prompts"}, {"export", "engine_source"}, {"controls"},
                 {"widgets", "publish"}, {"app"}),
    "training": ({"config", "labels", "losses", "prompts"}, {"saliency", "simulation", "oracles"}, {"step"},
                 {"trainer"}, {"recipes", "verdict"}, {"card"}, {"run"}, {"command"}),
    "evaluation": ({"statistics", "divergence", "methods", "items", "fewshot"},
                   {"answers", "answer_tables", "compare", "tables"}, {"answer_run"}),
    "latency": ({"memory", "report", "cost_model"}, {"measure"}, {"generation", "hardware", "training_cost"},
                {"methods"}, {"run", "side_by_side"}),
    "commands": ({"arguments"}, {"generate", "compare", "bench", "pruners"}),
}  # fmt: skip
# Modules that stay in the dark on purpose: what they must never import, at any depth of function.
NO_TORCH = {"extras", "shipped", "provenance", "load_failures", "files", "records", "config", "budget", "layer_shape",
            "model_shape", "paper", "plots", "views", "training.config", "pruning.token_fates",
            "latency.cost_model", "explorer.state", "explorer.live_html", "explorer.export",
            "explorer.widgets", "explorer.controls", "explorer.page", "explorer.typed"}  # fmt: skip
# `ModelShape.from_config` builds the model that it counts, which nobody but its caller asks for.
TORCH_ON_CALL = {"model_shape"}
NEVER = {
    "data": {"models", "architectures"},
    "pruning": {"models"},
    "pruning.selection": {"config", "budget", "records"},
    "scorers": {"models", "data"},
    "scorers.blend": {"config", "records", "budget", "pruning", "architectures"},
    "scorers.token_pruners": {"pruning.selection"},
    "scorers.stage_network": {"pruning.selection"},
    "training": {"plots", "views"},
    "training.losses": {"models", "config", "data", "pruning", "architectures"},
    "training.saliency": {"scorers"},
    "training.labels": {"scorers", "models"},
    "evaluation": {"plots", "views"},
    "latency.memory": {"config", "budget", "pruning", "scorers"},
    "latency.measure": {"config", "budget", "pruning", "scorers"},
    "latency.generation": {"config", "budget", "pruning", "scorers"},
    "latency.hardware": {"config", "budget", "pruning", "scorers"},
}
# Only `architectures` may know these of transformers and torch.
INTERNAL_MODULES = ("transformers.cache_utils", "transformers.masking_utils", "transformers.models",
                    "transformers.integrations", "transformers.modeling_attn_mask_utils",
                    "transformers.modeling_layers", "transformers.modeling_rope_utils")  # fmt: skip
INTERNAL_NAMES = {
    "AttentionInterface", "AttentionMaskInterface", "ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS",
    "DynamicCache", "DynamicLayer", "create_causal_mask", "create_sliding_window_causal_mask",
    "self_attn", "self_attention", "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value",
    "input_layernorm", "post_attention_layernorm", "apply_rotary_pos_emb", "rotary_emb",
}  # fmt: skip


# Hooks are torch's, but they change how a model runs: only these put them on, inside a `with`.
HOOKED = {"architectures", "pruning.engine", "pruning.masked_reference", "pruning.verify"}
HOOKS = {
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook", "register_module_forward_hook", "register_module_forward_pre_hook",
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    """``pruning.engine``; a folder's ``__init__`` has the folder's name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


each_module = pytest.mark.parametrize("path", modules(), ids=name_of)


def part_of(module: str) -> str:
    return module.partition(".")[0]


def among(module: str, names: Iterable[str]) -> bool:
    """Whether ``names`` has the module or its folder."""
    return module in names or part_of(module) in names


def imported(tree: ast.AST) -> set[str]:
    """Every dotted name that is imported anywhere in a file, in functions too; type-checking blocks are left out."""
    names: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"sdtp_lib.{node.module}".rstrip(".") if node.level else node.module
            names.update(f"{base}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return names


def edges(path: Path) -> set[str]:
    """The sdtp_lib modules that a file imports; names of the public face count as the module they come from."""
    known = {name_of(module) for module in modules()}
    found = set()
    for name in imported(ast.parse(path.read_text())):
        first, _, rest = name.partition(".")
        if first == "sdtp_lib":
            rest = sdtp_lib._HOME_OF.get(rest, rest)
            found |= {next((near for near in (rest, rest.rpartition(".")[0]) if near in known), "")}
    return found - {""}


def floor_of(name: str, floors: tuple[set[str], ...]) -> int:
    return next((number for number, floor in enumerate(floors) if name in floor), len(floors))


def allowed(upper: str, lower: str) -> bool:
    if among(lower, NEVER.get(upper, set()) | NEVER.get(part_of(upper), set())):
        return False
    if part_of(upper) != part_of(lower):
        is_lower = floor_of(part_of(lower), FLOORS) < floor_of(part_of(upper), FLOORS)
        return is_lower and (upper not in INSIDE or lower == "extras")
    floors = INSIDE[part_of(upper)]
    above, below = (floor_of(name.partition(".")[2], floors) for name in (upper, lower))
    return below < above


def internals_used(tree: ast.AST) -> set[str]:
    found = {name for name in imported(tree) if name.startswith(INTERNAL_MODULES)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(alias.name for alias in node.names if alias.name in INTERNAL_NAMES)
    return found | attributes_used(tree, INTERNAL_NAMES)


def attributes_used(tree: ast.AST, names: set[str]) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names}


@each_module
def test_every_module_has_its_floor(path):
    part, _, inner = name_of(path).partition(".")
    assert part in set().union(*FLOORS), f"{part} has no place in FLOORS: decide what it may import"
    if inner:
        assert inner in set().union(*INSIDE[part]), f"{part}.{inner} has no place in INSIDE: decide what it may import"


@each_module
def test_imports_run_one_way(path):
    wrong = sorted(lower for lower in edges(path) if not allowed(name_of(path), lower))
    assert not wrong, f"{name_of(path)} may not import {wrong}"


@each_module
def test_only_architectures_knows_transformers_internals(path):
    if part_of(name_of(path)) != "architectures":
        assert not internals_used(ast.parse(path.read_text()))


@each_module
def test_only_the_engine_and_its_door_put_hooks_on_a_model(path):
    if not among(name_of(path), HOOKED):
        assert not attributes_used(ast.parse(path.read_text()), HOOKS)


@each_module
def test_the_pure_modules_import_no_torch(path):
    if among(name_of(path), NO_TORCH):
        tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert name_of(path) in TORCH_ON_CALL or not tops & {"torch", "transformers", "safetensors", "accelerate"}
        assert not [lower for lower in edges(path) if not among(lower, NO_TORCH)]


def test_the_pure_modules_load_no_torch():
    names = [name for path in modules() if among(name := name_of(path), NO_TORCH)]
    program = f"import importlib, sys\nfor name in {names}: importlib.import_module('sdtp_lib.' + name)\n"
    assert run_python(program + "print('torch' in sys.modules)").strip() == "False"


@each_module
def test_a_module_opens_with_its_contract(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and len(docstring) > 60


@each_module
def test_a_module_can_be_read_in_one_go(path):
    assert len(path.read_text().splitlines()) <= 330, "about 250 lines a module: split it"


def test_no_module_is_a_drawer():
    names = {name for path in modules() for name in name_of(path).split(".")}
    assert not names & {"utils", "helpers", "common", "misc"}


def test_the_checks_see_a_forbidden_import_in_a_function():
    source = "def f():\n    from sdtp_lib.pruning.engine import token_pruning\n    import sdtp_lib.models\n"
    assert imported(ast.parse(source)) == {"sdtp_lib.pruning.engine.token_pruning", "sdtp_lib.models"}
    assert not allowed("config", "pruning.engine") and not allowed("data.samples", "models")
    assert allowed("pruning.engine", "architectures.layers") and not allowed("architectures.layers", "pruning.engine")
    assert allowed("pruning.engine", "pruning.prefill") and not allowed("pruning.prefill", "pruning.engine")
    assert not allowed("pruning", "config"), "a folder's __init__ imports its own modules only"


def test_the_checks_see_an_import_through_the_public_face(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("from sdtp_lib import scorers, token_pruning\n")
    assert edges(file) == {"scorers", "methods.call"}


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.cache_utils import DynamicCache",
        "import transformers.models.llama.modeling_llama",
        "def f(layer):\n    return layer.self_attn",
    ],
)
def test_the_checks_see_internals(source):
    assert internals_used(ast.parse(source))


def test_the_checks_see_a_hook():
    assert attributes_used(ast.parse("def f(m):\n    m.register_forward_pre_hook(print)"), HOOKS)


def run_python(program: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=False, env=environment, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_importing_the_package_loads_no_heavy_library():
    loaded = run_python("""
        import sys
        import sdtp_lib
        from sdtp_lib import PruningConfig, records
        PruningConfig.preset("keep09", num_layers=30)
        heavy = {"torch", "transformers", "numpy", "pandas", "matplotlib", "datasets", "IPython", "huggingface_hub"}
        print(sorted(heavy & set(sys.modules)))
    """)
    assert loaded.strip() == "[]"


def test_importing_the_package_changes_nothing():
    run_python("""
        import locale, logging, os, random, signal, sys, warnings
        def state():
            return (
                dict(os.environ), os.getcwd(), random.getstate(), list(warnings.filters), sys.path[:],
                sys.excepthook, logging.root.level, list(logging.root.handlers), signal.getsignal(signal.SIGINT),
                sys.getrecursionlimit(), locale.getlocale(), list(sys.meta_path),
            )
        before = state()
        import sdtp_lib
        dir(sdtp_lib), sdtp_lib.PruningConfig, sdtp_lib.records
        assert state() == before
    """)


def test_importing_every_module_leaves_transformers_and_torch_as_they_were():
    program = """
        import random
        import numpy, torch, transformers, matplotlib
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        def state():
            return (
                torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate(),
                torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                torch.are_deterministic_algorithms_enabled(), sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
                transformers.logging.get_verbosity(), dict(matplotlib.rcParams),
                len(torch.nn.modules.module._global_forward_hooks),
                len(torch.nn.modules.module._global_forward_pre_hooks),
            )
        before = state()
        import importlib, sys
        for name in sys.argv[1:] or MODULES:
            importlib.import_module("sdtp_lib." + name)
        after = state()
        assert after == before, [(a, b) for a, b in zip(before, after) if a != b]
    """
    names = [name_of(path) for path in modules() if path.stem not in {"harness", "fewshot", "app"}]
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program).replace("MODULES", repr(names))],
        capture_output=True, text=True, check=False, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize("folder", ["sdtp_lib", "benchmarks", "workflow", "notebooks", "tests"])
def test_nobody_but_architectures_calls_a_models_cache_by_a_name_of_its_own(folder):
    root = PACKAGE.parent / folder
    files = [path for path in (*root.rglob("*.py"), *root.glob("*.ipynb")) if "architectures" not in path.parts]
    files = [path for path in files if path != Path(__file__)]
    called = re.compile(r"\.past_key_values\b|[(,]\s*past_key_values=(?!None)")
    found = [path.name for path in files if called.search(path.read_text(encoding="utf-8"))]
    assert files and not found, "use cache_argument(model, cache) and cache_in(output): the name differs by release"
