"""Parameters are held against their annotations and the library's own checks before a kernel starts."""

from __future__ import annotations

import notebook_parameters
import papermill
import pytest
import study as front_door
import sweep
from notebook_parameters import ParameterError, check, matches, parameters_of


@pytest.mark.parametrize(
    ("value", "annotation", "fits"),
    [
        (1, "int", True),
        (True, "int", False),
        (1.5, "int", False),
        (1, "float", True),
        ("1", "float", False),
        (True, "float", False),
        ("x", "str", True),
        (None, "str", False),
        (None, "str | None", True),
        (True, "bool", True),
        (0, "bool", False),
        ([1, 2], "list[int]", True),
        ([1, "2"], "list[int]", False),
        ([1, 2], "tuple[int, ...]", True),
        ([1, 2, 3], "tuple[int, int]", False),
        (3, "list[int]", False),
        ("a", "Literal['a', 'b']", True),
        ("c", "Literal['a', 'b']", False),
        ({"a": 1}, "dict[str, float]", True),
        ({"a": "b"}, "dict[str, float]", False),
        ([0.9, [0.8]], "list[float | list[float]]", True),
    ],
)
def test_a_value_is_held_against_its_annotation(value, annotation, fits):
    assert matches(value, annotation) is fits


def test_parameters_have_type_default_and_help(stand_in_project):
    project = stand_in_project("04_latency", latency="layers: tuple[int, ...] = (4, 7)  # pruned before these\n")
    layers = parameters_of(project / "notebooks" / "04_latency.ipynb")["layers"]
    assert (layers.annotation, layers.default, layers.help) == ("tuple[int, ...]", (4, 7), "pruned before these")


def test_our_reading_of_a_parameters_cell_is_papermills(stand_in_project):
    path = (
        stand_in_project("04_latency", latency="keep_ratio: float = 0.9  # share kept\n") / "notebooks/04_latency.ipynb"
    )
    theirs = papermill.inspect_notebook(path)
    ours = parameters_of(path)
    assert list(theirs) == list(ours)
    assert theirs["keep_ratio"]["inferred_type_name"] == ours["keep_ratio"].annotation == "float"
    assert theirs["keep_ratio"]["help"] == ours["keep_ratio"].help


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("derived: int = 2 * seed", "only literals"),
        ("seed = 1", "not `name: type = value`"),
        ("import os", "not `name"),
    ],
)
def test_a_parameters_cell_holds_annotated_literals_only(stand_in_project, line, reason):
    path = stand_in_project("04_latency", latency=line + "\n") / "notebooks/04_latency.ipynb"
    with pytest.raises(ParameterError, match=reason):
        parameters_of(path)


PRUNING = (
    "keep_ratio: float = 0.9  # share kept\n"
    "layers: tuple[int, ...] = (4, 7)  # pruned before these\n"
    "preset: str = 'keep09'  # named setting\n"
    "model_name: str = 'embedded'  # model\n"
    "tasks: list[str] = ['needle']  # tasks\n"
    "label: str = 'removal'  # label\n"
    "pruners: str = ''  # pruners\n"
    "dtype: str = 'default'  # dtype\n"
    "recipe: str = 'sdtp'  # recipe\n"
)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"keep_rato": 0.8}, "keep_rato is no parameter of 04_latency: did you mean keep_ratio[?] It has run_dir"),
        ({"keep_ratio": "much"}, "keep_ratio='much' is not of type float"),
        ({"seed": 1.5}, "seed=1.5 is not of type int"),
        ({"keep_ratio": 0}, r"keep_ratio=0 is outside \(0, 1\]"),
        ({"keep_ratio": 1.2}, r"keep_ratio=1.2 is outside"),
        ({"keep_ratio": float("nan")}, "keep_ratio=nan is not a finite number"),
        ({"layers": [0, 3]}, "layer 0"),
        ({"layers": [7, 4]}, "ascending"),
        ({"layers": [4, 30]}, "the model has 30 decoder layers"),
        ({"preset": "keep06"}, "preset='keep06' is unknown: did you mean keep09[?] Choose one of keep09"),
        ({"dtype": "flaot32"}, "dtype='flaot32' is unknown: did you mean float32[?]"),
        ({"recipe": "spdt"}, "recipe='spdt' is unknown: did you mean sdtp[?] Choose among sdtp, paper"),
        ({"pause_s": -1.0}, "pause_s=-1.0 is negative"),
        ({"tasks": ["needel"]}, "tasks='needel' is unknown: did you mean needle[?] Choose among needle, multi_key"),
        ({"label": "removals"}, "label='removals' is unknown: did you mean removal[?]"),
        ({"model_name": "./not-there"}, "model_name='./not-there': there is no such file or folder"),
        ({"pruners": "pruners/mine"}, "pruners='pruners/mine': there is no such .* smollm2-135m-instruct"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_sentence(stand_in_project, given, sentence):
    path = stand_in_project("04_latency", latency=PRUNING) / "notebooks/04_latency.ipynb"
    with pytest.raises(ParameterError, match=sentence):
        check(path, given)


def test_training_parameters_are_checked_by_the_librarys_own_config(stand_in_project):
    lines = "learning_rate: float = 1e-3  # of AdamW\nepochs: float = 2.0  # passes\n"
    path = stand_in_project("02_training", training=lines) / "notebooks/02_training.ipynb"
    check(path, {"learning_rate": 1e-4})
    with pytest.raises(ParameterError, match="learning_rate"):
        check(path, {"learning_rate": 0.0})


def test_the_number_of_passes_alone_tells_that_a_notebook_trains(stand_in_project):
    path = stand_in_project("02_training", training="epochs: float = 2.0  # passes\n") / "notebooks/02_training.ipynb"
    with pytest.raises(ParameterError, match="epochs=0"):
        check(path, {"epochs": 0})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rate", "1e-3", 0.001),  # text, to YAML 1.1
        ("rate", "0.5", 0.5),
        ("rates", "[1e-3, 2e5]", [0.001, 200000.0]),
        ("mixed", "[0.9, [8e-1]]", [0.9, [0.8]]),
        ("word", "123", "123"),
        ("word", "no", "no"),
        ("word", "1e-3", "1e-3"),
        ("word", "", ""),
        ("seed", "7", 7),
    ],
)
def test_a_value_of_the_command_line_is_read_as_its_annotation_means_it(stand_in_project, name, text, value):
    lines = (
        "rate: float = 0.1  # a number\nrates: list[float] = [0.1]  # numbers\nword: str = ''  # a text\n"
        "mixed: list[float | list[float]] = [0.9]  # numbers of stages\n"
    )
    path = stand_in_project("04_latency", latency=lines) / "notebooks/04_latency.ipynb"
    assert check(path, {name: notebook_parameters.read_value(path, name, text)})[name] == value


def test_a_sweep_writes_small_numbers_as_everybody_does(stand_in_project):
    project = stand_in_project("04_latency", latency="rate: float = 0.1  # a number\n")
    (project / "set.yaml").write_text("run: r\nnotebooks:\n  04_latency:\n    rate: 1e-3\n")
    (job,) = sweep.plan(sweep.read_settings(project / "set.yaml"), project)
    assert job.parameters["rate"] == 0.001


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("run: [", "is not YAML"),
        ("- a\n", "holds no sections"),
        ("3: a\n", "unknown section.*'3'"),
        ("common: 3\n", "common holds 3: give names with values"),
        ("sweep: [seed]\n", r"sweep holds \['seed'\]: give names"),
        ("notebooks: [04_latency]\n", "notebooks holds .*: give names"),
        ("notebooks: {04_latency: 5}\n", "04_latency holds 5: give names"),
    ],
)
def test_a_parameter_set_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "set.yaml").write_text(content)
    with pytest.raises(ParameterError, match=f"set.yaml:? {sentence}") as caught:
        sweep.read_settings(tmp_path / "set.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "sentence"), [("cores: [", "config.yaml is not YAML"), ("- a", "mine holds no")])
def test_a_profile_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, content, sentence):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(content)
    with pytest.raises(ParameterError, match=sentence):
        front_door.on_slurm(str(tmp_path / "mine"))


def test_every_fault_is_named_at_once(stand_in_project):
    path = stand_in_project("04_latency", latency=PRUNING) / "notebooks/04_latency.ipynb"
    with pytest.raises(ParameterError) as error:
        check(path, {"keep_rato": 1, "seed": "x"})
    assert "keep_rato" in str(error.value) and "seed" in str(error.value)


def test_a_local_models_layers_are_read_from_its_folder(stand_in_project, tmp_path):
    path = stand_in_project("04_latency", latency=PRUNING) / "notebooks/04_latency.ipynb"
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}')
    with pytest.raises(ParameterError, match="the model has 6 decoder layers"):
        check(path, {"model_name": str(tmp_path)})


@pytest.mark.embedded
def test_the_embedded_models_layers_are_known_rightly(embedded):
    model, _ = embedded
    assert {"embedded": model.config.num_hidden_layers} == notebook_parameters.KNOWN_LAYERS


def test_describe_lists_every_parameter_with_its_help(stand_in_project):
    project = stand_in_project("04_latency", latency=PRUNING)
    text = notebook_parameters.describe([project / "notebooks/04_latency.ipynb"])
    assert "04_latency" in text and "tuple[int, ...]  (4, 7)" in text and "share kept" in text
