"""`PruningConfig`: presets, checks that name field, value and remedy, and its dictionary form."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sdtp_lib import PruningConfig, budget
from sdtp_lib.config import typed_budget


def test_presets_name_the_users_eight_layers_and_the_papers_ten():
    assert PruningConfig.preset("keep09", num_layers=28).layers == (4, 7, 10, 13, 16, 19, 22, 25)
    assert PruningConfig.preset("keep07", num_layers=32).layers == (4, 7, 10, 13, 16, 19, 22, 25, 28, 31)
    assert [PruningConfig.preset(name, 28).keep_ratio for name in ("keep09", "keep08", "keep07")] == [0.9, 0.8, 0.7]
    low = PruningConfig.preset("paper-low", num_layers=32)
    assert (low.layers, low.keep_ratio) == ((4, 9, 14, 19, 24), 0.9)


@pytest.mark.parametrize(("layers", "off_by"), [(28, 0.03), (30, 0.015), (32, 0.055), (36, 0.125)])
def test_the_fast_preset_has_four_stages_that_drop_early_at_about_keep07s_compression(layers, off_by):
    fast, even = (PruningConfig.preset(name, layers) for name in ("fast", "keep07"))
    assert len(fast.layers) == 4 and fast.layers[0] == 4 and set(fast.layers) <= set(even.layers)
    assert fast.layers[-1] < 0.8 * layers, "the last layers drop nothing"
    assert list(fast.keep_ratio) == sorted(fast.keep_ratio) and fast.keep_ratio[0] < 0.5
    tau = [budget.compression_ratio(budget.tokens_per_layer(config, layers, 1024)) for config in (fast, even)]
    assert tau[0] == pytest.approx(tau[1], rel=off_by)


def test_the_fast_preset_on_30_layers_and_on_shallow_models():
    assert PruningConfig.preset("fast", 30).layers == (4, 7, 13, 22)
    assert [PruningConfig.preset("fast", layers).layers for layers in (6, 9, 16)] == [(4,), (4, 7), (4, 7, 10, 13)]
    assert len(PruningConfig.preset("fast", 9).keep_ratio) == 2


def test_defaults_are_the_papers_protected_tokens():
    config = PruningConfig(layers=(4,))
    assert (config.keep_ratio, config.sink_tokens, config.local_ratio) == (0.9, 4, 0.1)
    assert (config.min_local_tokens, config.positions) == (16, "original")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layers": ()}, "layers=()"),
        ({"layers": (0, 4)}, "layer 0"),
        ({"layers": (-1,)}, "-1"),
        ({"layers": (4, 4)}, "[4, 4]"),
        ({"layers": (7, 4)}, "[7, 4]"),
        ({"layers": (1.5,)}, "1.5"),
        ({"layers": "4"}, "layers='4'"),
        ({"layers": 4}, "layers=4"),
        ({"layers": (4,), "keep_ratio": 0}, "keep_ratio=0"),
        ({"layers": (4,), "keep_ratio": 1.1}, "keep_ratio=1.1"),
        ({"layers": (4,), "keep_ratio": -0.5}, "keep_ratio=-0.5"),
        ({"layers": (4,), "keep_ratio": float("nan")}, "keep_ratio=nan"),
        ({"layers": (4,), "keep_ratio": "0.9"}, "keep_ratio='0.9'"),
        ({"layers": (4,), "keep_ratio": (0.9, 0.8)}, "2 entries for 1 layers"),
        ({"layers": (4,), "sink_tokens": -1}, "sink_tokens=-1"),
        ({"layers": (4,), "sink_tokens": 2.5}, "sink_tokens=2.5"),
        ({"layers": (4,), "min_local_tokens": True}, "min_local_tokens=True"),
        ({"layers": (4,), "local_ratio": 1.5}, "local_ratio=1.5"),
        ({"layers": (4,), "positions": "rotary"}, "positions='rotary'"),
    ],
)
def test_a_bad_field_is_a_value_error_that_names_it_and_its_value(fields, named):
    with pytest.raises(ValueError) as error:
        PruningConfig(**fields)
    assert named in str(error.value)


def test_an_unknown_preset_and_too_few_layers_are_refused_by_name():
    with pytest.raises(ValueError, match="preset='keep05'.*keep09"):
        PruningConfig.preset("keep05", num_layers=28)
    with pytest.raises(ValueError, match=r"paper-low.*num_layers=24 gives 4"):
        PruningConfig.preset("paper-low", num_layers=24)
    with pytest.raises(ValueError, match="num_layers=4"):
        PruningConfig.preset("keep09", num_layers=4)


def test_layers_beyond_the_model_are_refused_with_the_range():
    with pytest.raises(ValueError, match=r"names \[28, 31\].*28 decoder layers.*1 to 27"):
        PruningConfig(layers=(4, 28, 31)).validate_for(28)


def test_each_stage_may_have_its_own_ratio():
    config = PruningConfig(layers=(4, 7), keep_ratio=(0.9, 0.5))
    assert (config.ratio_at(4), config.ratio_at(7)) == (0.9, 0.5)


def test_the_dictionary_form_is_json_and_comes_back_equal():
    import json

    config = PruningConfig(layers=(4, 7), keep_ratio=(0.9, 0.5), positions="compact")
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"\['ratio'\]"):
        PruningConfig.from_dict({"layers": [4], "ratio": 0.9})


def test_a_config_is_frozen_and_replace_checks_again():
    config = PruningConfig(layers=(4,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.keep_ratio = 0.5
    assert config.replace(keep_ratio=0.5).keep_ratio == 0.5
    with pytest.raises(ValueError, match="keep_ratio=2"):
        config.replace(keep_ratio=2)


@pytest.mark.parametrize("field", ["keep_ratio", "keep_tokens"])
def test_an_array_of_no_dimension_is_a_number(field):
    number = {"keep_ratio": 0.5, "keep_tokens": 9}[field]
    assert getattr(PruningConfig((4,), **{field: np.array(number)}), field) == number


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PruningConfig(np.array(4)), r"layers=array\(4\) is not a list"),
        (lambda: PruningConfig.from_dict({}), "with layers at least"),
        (lambda: PruningConfig.from_dict(None), "None is no PruningConfig"),
        (lambda: PruningConfig((4,)).replace(foo=1), r"unknown field\(s\) \['foo'\]"),
    ],
)
def test_what_is_no_configuration_is_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("text", "budget"), [("0.8", 0.8), (".5", 0.5), ("1", 1.0), *((text, text) for text in ("2x", "fast", "nan", "-1"))]
)
def test_a_keep_ratio_that_was_typed_is_a_number_and_nothing_else_is(text, budget):
    assert typed_budget(text) == budget and type(typed_budget(text)) is type(budget)
