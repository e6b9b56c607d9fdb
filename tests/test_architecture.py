"""The library's shape: imports run one way (the contracts are pyproject.toml's), one door to transformers' internals,
an import that changes nothing.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sdtp_lib"

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
    """Every dotted name that is imported anywhere in a file, in functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def internals_used(tree: ast.AST) -> set[str]:
    found = {name for name in imported(tree) if name.startswith(INTERNAL_MODULES)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(alias.name for alias in node.names if alias.name in INTERNAL_NAMES)
    return found | attributes_used(tree, INTERNAL_NAMES)


def attributes_used(tree: ast.AST, names: set[str]) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names}


def broken_contracts(package: Path) -> str:
    """What `lint-imports` says of the package below this folder, with the repository's contracts; "" where all hold."""
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=package,
        env={"PYTHONPATH": str(package), "COLUMNS": "500"},
    )  # fmt: skip
    return "" if ended.returncode == 0 else ended.stdout + ended.stderr


def test_imports_run_one_way():
    assert not broken_contracts(PACKAGE.parent)


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("config.py", "def f():\n    from sdtp_lib.pruning.engine import token_pruning\n", "Between folders BROKEN"),
        ("views/looks.py", "from sdtp_lib import plots\n", "Between folders BROKEN"),
        ("pruning/prefill.py", "from sdtp_lib import token_pruning\n", "public face BROKEN"),
        ("pruning/prefill.py", "import sdtp_lib.pruning.engine\n", "Within pruning BROKEN"),
        ("evaluation/items.py", "from sdtp_lib.evaluation import compare_scorers\n", "Within evaluation BROKEN"),
        ("records.py", "def f():\n    import torch\n", "need no torch BROKEN"),
        ("pruning/newcomer.py", "", "newcomer"),
    ],
)
def test_the_contracts_see_a_wrong_import(tmp_path, file, line, contract):
    shutil.copytree(PACKAGE, tmp_path / "sdtp_lib", ignore=lambda _, names: {n for n in names if n == "__pycache__"})
    shutil.copy(PACKAGE.parent / "pyproject.toml", tmp_path)
    with (tmp_path / "sdtp_lib" / file).open("a") as module:
        module.write(line)
    assert contract in broken_contracts(tmp_path)


@each_module
def test_only_architectures_knows_transformers_internals(path):
    if part_of(name_of(path)) != "architectures":
        assert not internals_used(ast.parse(path.read_text()))


@each_module
def test_only_the_engine_and_its_door_put_hooks_on_a_model(path):
    if not among(name_of(path), HOOKED):
        assert not attributes_used(ast.parse(path.read_text()), HOOKS)


def test_the_pure_modules_load_no_torch():
    contracts = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (pure,) = (contract["source_modules"] for contract in contracts if contract["name"] == "Modules that need no torch")
    program = f"import importlib, sys\nfor name in {pure}: importlib.import_module(name)\n"
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
