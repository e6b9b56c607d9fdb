"""A notebook's parameters: their names, types, defaults and help, and the checks before a kernel starts.

Reads the one cell tagged `parameters`, in which each line is ``name: type = literal  # help``. papermill itself only
warns of an unknown name and knows no types; here both are errors, and so are values that the library's checks refuse.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import io
import json
import math
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

import sdtp_lib
from sdtp_lib.config import PRESETS, PruningConfig
from sdtp_lib.data.tasks import TASKS
from sdtp_lib.load_failures import first_line
from sdtp_lib.shipped import shipped_pruners
from sdtp_lib.training.config import TrainingConfig

DTYPES = ("default", "auto", "float32", "bfloat16", "float16", "float64")
# Layers of models that can be named without reading a file or asking a hub.
KNOWN_LAYERS = {"embedded": 30}
# A notebook with this parameter trains, and `TrainingConfig` checks what it has of its fields.
TRAINING = {"epochs"}
# What an annotation may be made of.
_TYPES = {each.__name__: each for each in (int, float, str, bool, list, tuple, dict)} | {"Any": Any, "Literal": Literal}
PRUNING_FIELDS = tuple(field.name for field in dataclasses.fields(PruningConfig))


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell."""

    name: str
    annotation: str
    default: Any
    help: str


class ParameterError(ValueError):
    """What is wrong with the parameters of a notebook, one sentence per line."""


def load_notebook(path: Path) -> dict[str, Any]:
    """The notebook's JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParameterError(f"there is no notebook {path.name}: look in notebooks/.") from None
    except ValueError as error:
        raise ParameterError(f"{path.name} is not a notebook: {error}.") from None


def language_of(notebook: Mapping[str, Any]) -> str:
    """The language of a notebook's code, in small letters."""
    metadata = notebook.get("metadata", {})
    named = [metadata.get("kernelspec", {}).get("language"), metadata.get("language_info", {}).get("name"), "python"]
    return next(str(name) for name in named if name).lower()


def source_of(cell: Mapping[str, Any]) -> str:
    """A cell's text; the format allows one string or a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def tags_of(cell: Mapping[str, Any]) -> list[str]:
    """A cell's tags."""
    return cell.get("metadata", {}).get("tags", [])


def code_lines(source: str) -> str:
    """A cell's source without magics and shell lines, as Python can parse it."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def parameters_of(path: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name, in the order of their cell.

    Raises
    ------
    ParameterError
        No such cell, more than one, or a line in it that is not an annotated literal.
    """
    cells = [cell for cell in load_notebook(path)["cells"] if "parameters" in tags_of(cell)]
    if len(cells) != 1:
        raise ParameterError(f"{path.name} has {len(cells)} cells tagged `parameters`: it needs exactly one.")
    source = source_of(cells[0])
    comments = _comments(source)
    found = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            raise ParameterError(
                f"{path.name}, parameters cell: `{ast.unparse(statement)}` is not `name: type = value`."
            )
        try:
            default = ast.literal_eval(statement.value)
        except ValueError:
            raise ParameterError(
                f"{path.name}, parameters cell: `{ast.unparse(statement)}` derives a value: only literals belong here."
            ) from None
        name = statement.target.id
        found[name] = Parameter(
            name, ast.unparse(statement.annotation), default, comments.get(statement.end_lineno, "")
        )
    return found


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def matches(value: Any, annotation: str) -> bool:
    """Whether a value out of YAML or JSON fits a parameter's annotation; lists stand for tuples there."""
    try:
        # As JSON, whose lists pydantic takes for tuples too; strictly, so that a text is no number and a flag no count.
        _adapter(annotation).validate_json(json.dumps(value), strict=True)
    except (TypeError, pydantic.ValidationError):
        return False
    return True


@functools.cache
def _adapter(annotation: str) -> pydantic.TypeAdapter:
    try:
        return pydantic.TypeAdapter(eval(annotation, {"__builtins__": {}}, _TYPES))
    except (NameError, TypeError, SyntaxError, pydantic.errors.PydanticUserError):
        raise ParameterError(f"the annotation `{annotation}` is not one that can be checked.") from None


def read_value(path: Path, name: str, text: str) -> Any:
    """A parameter from a command line: YAML, but text where the annotation says text (``123``, ``no``, nothing at all).

    Raises
    ------
    ParameterError
        If it is not YAML.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = first_line(error)
        raise ParameterError(f"{name}={text!r} is not a value as YAML writes one ({reason}): quote it.") from None
    annotation = parameters_of(path)[name].annotation if name in parameters_of(path) else "Any"
    meant_as_text = not matches(value, annotation) and matches(text, annotation) and (value is not None or not text)
    return text if meant_as_text else value


def as_written(value: Any, annotation: str) -> Any:
    """``value`` with texts such as ``1e-3``, which YAML 1.1 leaves text, as numbers where those are wanted."""

    def with_numbers(value: Any) -> Any:
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
        if isinstance(value, dict):
            return {key: with_numbers(item) for key, item in value.items()}
        return [with_numbers(item) for item in value] if isinstance(value, (list, tuple)) else value

    changed = value if matches(value, annotation) else with_numbers(value)
    return changed if matches(changed, annotation) else value


def check(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """All values with which a notebook would run: its defaults, and ``given`` over them.

    Raises
    ------
    ParameterError
        Names every unknown name, wrong type and impossible value, and what would be right.
    """
    known = parameters_of(path)
    given = {name: as_written(v, known[name].annotation) if name in known else v for name, v in given.items()}
    faults = [
        f"{name} is no parameter of {path.stem}: {meant(name, known, 'it has')}" for name in given if name not in known
    ]
    for name, value in given.items():
        if name in known and not matches(value, known[name].annotation):
            faults.append(
                f"{name}={value!r} is not of type {known[name].annotation} ({path.stem}: {known[name].help})."
            )
    values = {name: given.get(name, parameter.default) for name, parameter in known.items()}
    if not faults:
        wrong = [*impossible(values), *_missing_files(values, path.resolve().parents[1])]
        faults = list(wrong)
    if faults:
        raise ParameterError("\n".join(faults))
    return values


def meant(name: object, known: Iterable[str], then: str = "there are") -> str:
    """What a misspelt name may have meant, and what there is: the end of every refusal of an unknown name."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]}? {then.capitalize()} {', '.join(known)}." if near else f"{then} {', '.join(known)}."


def impossible(values: Mapping[str, Any]) -> list[str]:
    """What cannot be though well-typed: numbers out of range, what `PruningConfig` refuses, layers beyond the model."""
    faults = []
    for name, value in values.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                if not math.isfinite(number):
                    faults.append(f"{name}={number} is not a finite number.")
                elif number < 0:
                    faults.append(f"{name}={number} is negative.")
    presets = values.get("presets", values.get("preset"))
    for preset in [presets] if isinstance(presets, str) else presets or []:
        if preset and preset not in PRESETS:
            faults.append(f"preset={preset!r} is unknown: {meant(preset, PRESETS, 'choose one of')}")
    faults.extend(_unknown_names(values))
    faults.extend(_refused_by_config(values))
    if set(values) >= TRAINING:
        faults.extend(_refused_by_training(values))
    return faults


def _unknown_names(values: Mapping[str, Any]) -> list[str]:
    """Names out of the library's lists: tasks, labels, inputs of the pruners, recipes, dtypes."""
    known = {
        ("task", "tasks"): TASKS,
        ("label", "labels"): _constant("training/labels.py", "LABELS"),
        ("loss_on",): _constant("training/labels.py", "LOSS_ON"),
        ("features",): _constant("scorers/token_pruners.py", "FEATURES"),
        ("recipe",): _constant("training/recipes.py", "RECIPES"),
        ("dtype",): DTYPES,
    }
    faults = []
    for parameters, names in known.items():
        for parameter in parameters:
            given = values.get(parameter) or []
            for name in [given] if isinstance(given, str) else given:
                if name not in names:
                    faults.append(f"{parameter}={name!r} is unknown: {meant(name, names, 'choose among')}")
    return faults


def _constant(module: str, name: str) -> Any:
    """Names that a module of the library that would load torch lists, read from its text; of a table its keys."""
    tree = ast.parse((Path(sdtp_lib.__file__).parent / module).read_text(encoding="utf-8"))
    wanted = (node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name)
    value = next(wanted).value
    if isinstance(value, ast.Dict):
        return tuple(_constant(module, key.id) if isinstance(key, ast.Name) else key.value for key in value.keys)
    return ast.literal_eval(value)


def _missing_files(values: Mapping[str, Any], root: Path) -> list[str]:
    """Folders and files that are not there. What another notebook will have written by then is not asked for."""
    faults = []
    for name in ("model_name", "pruners", "instructions", "own_data"):
        given = values.get(name)
        if not isinstance(given, str) or not given or given.startswith(("data/results", "{")):
            continue
        there = (root / given).exists()
        # "owner/name" may be on the Hub; pruners come with the package or in a folder, nothing else.
        a_path = given.startswith((".", "/", "~")) or given.count("/") > 1 or given.endswith((".jsonl", ".gguf"))
        if not there and (given not in shipped_pruners() if name == "pruners" else a_path):
            ships = f", and the pruners that ship are {', '.join(shipped_pruners())}" if name == "pruners" else ""
            faults.append(f"{name}={given!r}: there is no such file or folder under the project's root{ships}.")
    return faults


def _refused_by_training(values: Mapping[str, Any]) -> list[str]:
    fields = {field.name: values[field.name] for field in dataclasses.fields(TrainingConfig) if field.name in values}
    try:
        TrainingConfig(**fields)
    except (ValueError, TypeError) as error:
        return [str(error)]
    return []


def _refused_by_config(values: Mapping[str, Any]) -> list[str]:
    fields = {name: values[name] for name in PRUNING_FIELDS if values.get(name) not in (None, (), [])}
    fields.setdefault("layers", (1,))
    ratios = values.get("keep_ratios") or [None]
    faults = []
    for ratio in ratios:
        try:
            config = PruningConfig(**(fields if ratio is None else fields | {"keep_ratio": ratio}))
            layers = layers_of(str(values.get("model_name", "")))
            if layers is not None:
                config.validate_for(layers)
        except ValueError as error:
            faults.append(str(error))
    return faults


def layers_of(model_name: str) -> int | None:
    """How many decoder layers a model has, where that is known without a hub: the embedded one, or a local folder's."""
    config = Path(model_name) / "config.json"
    if model_name and config.is_file():
        fields = json.loads(config.read_text())
        return fields.get("num_hidden_layers", fields.get("n_layer"))
    return KNOWN_LAYERS.get(model_name)


def words(parameters: Mapping[str, Any]) -> str:
    """Parameters as ``name=value`` in one line; what a notebook has by itself is ``defaults``."""
    said = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in parameters.items()]
    return " ".join(said) or "defaults"


def describe(paths: list[Path]) -> str:
    """All parameters of the notebooks as text: name, type, default, help."""
    blocks = []
    for path in paths:
        rows = [(p.name, p.annotation, repr(p.default), p.help) for p in parameters_of(path).values()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join(f"{row[column]:<{widths[column]}}" for column in range(3)) + f"  {row[3]}" for row in rows]
        blocks.append("\n".join([path.stem, *(f"  {line}" for line in lines)]))
    return "\n\n".join(blocks)
