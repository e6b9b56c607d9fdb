"""Numbers that a person gave: what is one passes as a plain one, all else is refused by field and value."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from sdtp_lib import PruningConfig, checked

REAL = (checked.real_number, checked.weight, checked.share)
WHOLE = (checked.whole_number, checked.count, checked.count_of_tokens, checked.neighbours)
NO_NUMBERS = [
    None, True, np.True_, torch.tensor(True), "1", b"1", 1j, np.complex128(1 + 2j), torch.tensor(1j), [], [1], {},
    torch.tensor([1.0, 2.0]), np.array([1, 2]), torch.empty((), device="meta"), float("nan"), torch.tensor(torch.nan),
]  # fmt: skip


@pytest.mark.parametrize("check", REAL + WHOLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: f"{type(value).__name__} {value}")
def test_what_is_no_number_is_refused_by_field_and_value(check, value):
    """``float`` takes ``np.True_`` for 1, ``b"1"`` too, and of a complex number the real part."""
    with pytest.raises(ValueError, match="^some_field="):
        check("some_field", value)


@pytest.mark.parametrize("value", [1, np.int8(1), np.array(1), torch.tensor(1)])
def test_one_number_of_any_library_is_a_plain_one(value):
    for check in REAL + WHOLE:
        assert check("x", value) == 1 and type(check("x", value)) is (float if check in REAL else int)
    for real in (np.float16(1), torch.tensor(1.0), Fraction(1), Decimal(1)):
        assert checked.real_number("x", real) == 1.0


@pytest.mark.parametrize(("check", "value"), [
    (checked.share, 0), (checked.share, 1.5), (checked.share, -1), (checked.share, float("inf")), (checked.count, -1),
    (checked.weight, float("-inf")), (checked.count_of_tokens, 0), (checked.neighbours, 4), (checked.neighbours, -1),
])  # fmt: skip
def test_a_number_out_of_its_range_is_refused(check, value):
    with pytest.raises(ValueError, match=f"^x={value}"):
        check("x", value)


def test_a_configuration_of_numpys_truth_value_is_refused():
    with pytest.raises(ValueError, match="^keep_ratio="):
        PruningConfig((1,), np.True_)
