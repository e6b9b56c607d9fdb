"""Arguments that commands share: the model, prompts, the budget. Knows no torch until something is loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_lib.checked import typed_amount as amount  # noqa: F401  (commands and benchmarks find all types here)
from sdtp_lib.checked import typed_count as count  # noqa: F401
from sdtp_lib.config import PRESETS, typed_budget

if TYPE_CHECKING:
    from sdtp_lib.data.prompts import Prompt


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, a 0 too, but not that a default is None or nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        silent = default is None or default is False or default == []
        return action.help if silent else super()._get_help_string(action)


def parser_of(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser that tells defaults."""
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=_Help)


MODEL_HELP = "a folder, a .gguf file, a Hub id, or 'embedded' (SmolLM2-135M-Instruct)"


def add_model(parser: argparse.ArgumentParser, *, optional: str = "") -> None:
    """The model and how it is loaded; ``optional`` says what a model is good for where one may be left out."""
    what = f"{optional}: {MODEL_HELP}" if optional else MODEL_HELP
    parser.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=what)
    parser.add_argument("--dtype", default="default", help="default (float32 on a CPU, 16 bits on a GPU), auto, "
                        "float32, bfloat16, float16")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager, ...; default: transformers' choice")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that lies beside the weights")


def load(given: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from sdtp_lib.models import load_model

    return load_model(
        given.model, dtype=given.dtype, device=given.device, attn_implementation=given.attn_implementation,
        trust_remote_code=given.trust_remote_code,
    )  # fmt: skip


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Where prompts come from."""
    parser.add_argument("files", nargs="*", metavar="FILE", help="a text file is one prompt; of a .jsonl file "
                        "each line is one (prompt, or instruction and context, or messages); - is standard "
                        "input")  # fmt: skip
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument("--no-chat", action="store_true", help="feed the bare text; default: the model's chat format "
                        "where it has one")  # fmt: skip


def prompts_of(given: argparse.Namespace) -> list[Prompt]:
    """The prompts, before any model is loaded.

    Raises
    ------
    ValueError
        If there is none, or one is empty.
    """
    from sdtp_lib.data.prompts import STANDARD_INPUT, Prompt, prompts_in

    found = [Prompt.of_text(f"--prompt {number}", text) for number, text in enumerate(given.prompt, start=1)]
    for file in given.files:
        content = sys.stdin.buffer.read() if file == "-" else _content(Path(file))
        found += prompts_in(content, STANDARD_INPUT if file == "-" else Path(file).name)
    if not found:
        raise ValueError("there is no prompt: name a file, give --prompt TEXT, or - for standard input.")
    return found


def prompt_ids(
    prompts: Sequence[Prompt], model: Any, tokenizer: Any, given: argparse.Namespace
) -> dict[str, list[int]]:
    """Name -> token ids of each prompt, as it is fed to the model.

    Raises
    ------
    ValueError
        For a prompt that the model has too few positions for.
    """
    from sdtp_lib.model_shape import positions

    room = positions(model)
    found = {}
    for prompt in prompts:
        ids = prompt.token_ids(tokenizer, chat=not given.no_chat)
        if room is not None and len(ids) + given.new_tokens > room:
            raise ValueError(
                f"{prompt.name}: {len(ids):,} prompt and {given.new_tokens} new tokens are more than the model's "
                f"{room:,} positions: shorten the prompt."
            )
        name = prompt.name
        while name in found:
            name += "'"
        found[name] = ids
    return found


def add_budget(parser: argparse._ActionsContainer, default: str = "2x") -> None:
    """How much is pruned."""
    parser.add_argument("--budget", type=typed_budget, default=default, metavar="B", help="a prefill of so many times "
                        f"fewer FLOPs (2x), a preset ({', '.join(PRESETS)}), or the share that every stage keeps "
                        "(0.8)")  # fmt: skip


METHOD_HELP = (
    "NAME or NAME@SPEEDUP: a published method with its paper's budget, or scaled to a prefill speed-up by FLOPs "
    "(fastkv, lazyllm@2x); see sdtp_lib.methods"
)


def method_of(text: str) -> str:
    """For ``type=``: a method that exists, at a speed-up that it can have; as it was typed."""
    from sdtp_lib import methods

    try:
        methods.named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def check_budget(budget: str | float) -> None:
    """Refuse a budget that no model can have, before one is loaded."""
    from sdtp_lib.methods.call import refuse_impossible

    refuse_impossible("--budget ", budget, "by --method")


def make_folder(option: str, path: Path) -> None:
    """Make the folder of results, before anything is loaded or measured; one that is there is kept as it is.

    Raises
    ------
    ValueError
        If it cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "that is a file" if path.is_file() else error.strerror
        raise ValueError(f"{option} {path}: {reason}: name another folder.") from error


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a text or .jsonl file with prompts.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a text or .jsonl file.") from error
