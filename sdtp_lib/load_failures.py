"""Why something could not be loaded, and what helps: one table of causes, for models, pruners and data sets alike.

transformers, datasets and the Hub's client wrap one another's errors, so a cause is looked for in the whole chain of
exceptions: by the class's name, or by words of the message where several causes share a class. Imports none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """One reason for a failed load.

    Attributes
    ----------
    name
        What it is, for tests and readers.
    classes, words
        An exception of one of these classes, or a message with one of these words in it, tells it.
    remedy
        What the user can do.
    """

    name: str
    remedy: str
    classes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def tells(self, error: BaseException) -> bool:
        """Whether this is what ``error`` says."""
        names = {kind.__name__ for kind in type(error).__mro__}
        return bool(names & set(self.classes)) or any(words in str(error) for words in self.words)


# The first that fits counts, so that what is special stands before what is general: a gated repository is also "not
# found", and a machine that was told to stay offline also "cannot connect".
CAUSES = (
    Cause(
        "disk full", "free some space, or point HF_HOME to a larger disk",
        words=("No space left on device", "Disk quota exceeded"),
    ),
    Cause(
        "gated", "ask for access on its page on the Hub, then log in with `hf auth login`",
        ("GatedRepoError",), ("gated repo", "is a gated"),
    ),
    Cause(
        "revision", "check the revision: a branch, a tag or a commit of that repository",
        ("RevisionNotFoundError",), ("is not a valid git identifier",),
    ),
    Cause(
        "offline", "unset HF_HUB_OFFLINE, or give something that is on this machine already",
        ("OfflineModeIsEnabled",), ("offline mode is enabled", "HF_HUB_OFFLINE"),
    ),
    Cause(
        "id", "check the id, which is owner/name; a private one needs `hf auth login`",
        ("RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError"),
        ("is not a valid model identifier", "doesn't exist on the Hub"),
    ),
    Cause(
        "no such file", "that repository lacks the file, so it is not in the format that is read here: check the id",
        ("RemoteEntryNotFoundError",), ("does not appear to have a file named",),
    ),
    Cause(
        "busy", "the Hub limits or fails requests just now: wait and try again, logged in with `hf auth login`",
        words=("Too Many Requests", "502 Bad Gateway", "503 Service", "504 Gateway"),
    ),
    Cause(
        "network", "check the network, or give something that is on this machine already",
        ("ConnectError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "TimeoutException", "ProxyError"),
        ("couldn't connect", "Couldn't reach", "find the requested files in the local cache"),
    ),
    Cause(
        "permission", "give yourself the right to read and write there, or point HF_HOME to a folder of your own",
        ("PermissionError",),
    ),
    Cause(
        "remote code", "read the code that it brings, and if you trust it, pass trust_remote_code=True",
        words=("trust_remote_code",),
    ),
    Cause(
        "flash attention", "install that package (its build must fit torch and the GPU), or give "
        "attn_implementation='sdpa'",
        words=("FlashAttention", "flash_attn", "flash-attn"),
    ),
    Cause(
        "attention", "give attn_implementation='sdpa' or 'eager', or leave it out",
        words=("attn_implementation", "does not support an attention implementation", "scaled_dot_product_attention"),
    ),
    Cause(
        "tokenizer", "add the tokenizer's files (tokenizer.json); old ones need `pip install sentencepiece tiktoken`",
        words=("sentencepiece or tiktoken", "SentencePiece", "backend tokenizer"),
    ),
    Cause("accelerate", "pip install accelerate, or leave device_map out", words=("accelerate",)),
    Cause("package", "install the package that is named there", ("ImportError",)),
    Cause(
        "architecture", "install a transformers that knows it; where the repository brings code of its own, pass "
        "trust_remote_code=True",
        words=("does not recognize this architecture",),
    ),
    Cause(
        "not a causal language model", "give a causal language model (AutoModelForCausalLM): others have no prompt to "
        "prune",
        words=("Unrecognized configuration class",),
    ),
)  # fmt: skip


def cause_of(error: BaseException) -> Cause | None:
    """The cause of a failed load, if the table knows it."""
    return next((cause for cause in CAUSES if any(map(cause.tells, _chain(error)))), None)


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sentence(error: BaseException, otherwise: str) -> str:
    """``(what the error says): what helps``, in one line; ``otherwise`` helps against what the table does not know."""
    cause = cause_of(error)
    return f"({first_line(error).rstrip('.: ')}): {cause.remedy if cause else otherwise}."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
