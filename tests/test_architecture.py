"""The library's shape: who may import whom, one door to transformers' internals, an import that changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sdtp_lib"

# From the ground up. A module may import modules of lower floors; within its own floor only what BESIDE allows.
FLOORS = (
    {"errors", "provenance", "paper_numbers"},
    {"records", "config", "training_config", "model_shape", "blend", "looking_back"},
    {"budget", "selection", "losses", "pruners", "models", "data", "profiling"},
    {"architectures", "tasks", "longbench", "fates", "costmodel"},
    {"stage", "trace", "generation_guard", "plots"},
    {"continuation", "prefill", "saliency", "scorers", "views"},
    {"engine", "widgets"},
    {"training", "evaluation"},
    {"harness", "app", "latency"},
)
BESIDE = {("prefill", "continuation"), ("longbench", "tasks"), ("app", "widgets")}
# Modules that stay in the dark on purpose: what they must never import, at any depth of function.
NO_TORCH = {"errors", "provenance", "records", "config", "training_config", "budget", "model_shape", "fates",
            "paper_numbers", "costmodel", "looking_back", "plots", "views", "widgets"}  # fmt: skip
NEVER = {
    "data": {"models"},
    "tasks": {"models", "architectures"},
    "pruners": {"selection"},
    "blend": {"config", "records"},
    "scorers": {"models", "data"},
    "selection": {"models", "config", "budget"},
    "losses": {"models", "config", "data"},
    "profiling": {"config", "selection", "budget", "pruners"},
    "models": {"config", "selection", "budget"},
    "architectures": {"pruners", "losses", "data"},
    "engine": {"models", "data", "pruners", "scorers", "losses"},
    "saliency": {"pruners", "losses"},
    "training": {"plots"},
    "evaluation": {"plots"},
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
HOOKED = {"architectures", "engine"}
HOOKS = {
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook", "register_module_forward_hook", "register_module_forward_pre_hook",
}  # fmt: skip


def family(module: str) -> str:
    """Parts of one module, split for length, count as that module: architectures_masks is architectures."""
    known = set().union(*FLOORS)
    stem = module.split(".")[-1]
    while stem not in known and "_" in stem:
        stem = stem.rpartition("_")[0]
    return stem


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


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
    """The sdtp_lib modules that a file imports."""
    stems = {module.stem for module in modules()}
    found = set()
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "sdtp_lib":
            found.update(part for part in parts[1:2] if part in stems)
    return found


def floor_of(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if family(module) in floor)


def allowed(upper: str, lower: str) -> bool:
    if family(upper) == family(lower):
        return True
    if family(lower) in NEVER.get(family(upper), ()):
        return False
    return floor_of(lower) < floor_of(upper) or (family(upper), family(lower)) in BESIDE


def internals_used(tree: ast.AST) -> set[str]:
    found = {name for name in imported(tree) if name.startswith(INTERNAL_MODULES)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(alias.name for alias in node.names if alias.name in INTERNAL_NAMES)
    return found | attributes_used(tree, INTERNAL_NAMES)


def attributes_used(tree: ast.AST, names: set[str]) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_every_module_has_its_floor(path):
    assert family(path.stem) in set().union(*FLOORS), f"{path.name} has no place in FLOORS: decide what it may import"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    wrong = sorted(lower for lower in edges(path) if not allowed(path.stem, lower))
    assert not wrong, f"{path.stem} may not import {wrong}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_only_architectures_knows_transformers_internals(path):
    if family(path.stem) != "architectures":
        assert not internals_used(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_only_the_engine_and_its_door_put_hooks_on_a_model(path):
    if family(path.stem) not in HOOKED:
        assert not attributes_used(ast.parse(path.read_text()), HOOKS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_the_pure_modules_import_no_torch(path):
    if family(path.stem) in NO_TORCH:
        tops = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not tops & {"torch", "transformers", "safetensors", "accelerate"}
        assert {family(lower) for lower in edges(path)} <= NO_TORCH


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_opens_with_its_contract(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring and len(docstring) > 60


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_can_be_read_in_one_go(path):
    assert len(path.read_text().splitlines()) <= 330, "about 250 lines a module: split it"


def test_no_module_is_a_drawer():
    assert not {path.stem for path in modules()} & {"utils", "helpers", "common", "misc"}


def test_the_checks_see_a_forbidden_import_in_a_function():
    source = "def f():\n    from sdtp_lib.engine import token_pruning\n    import sdtp_lib.models\n"
    assert imported(ast.parse(source)) == {"sdtp_lib.engine.token_pruning", "sdtp_lib.models"}
    assert not allowed("config", "engine") and not allowed("data", "models") and allowed("engine", "architectures")


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
    names = [path.stem for path in modules() if family(path.stem) not in {"harness", "app"}]
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program).replace("MODULES", repr(names))],
        capture_output=True, text=True, check=False, cwd=PACKAGE.parent,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
