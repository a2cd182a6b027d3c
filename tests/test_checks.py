import math

import pytest

from utils.checks import check_choice, check_range, did_you_mean, nearest, show


def test_check_choice_returns_a_choice_and_names_the_nearest_for_another():
    assert check_choice("--scheduler", "poly", ["cosine", "poly"]) == "poly"
    with pytest.raises(ValueError) as error:
        check_choice("--scheduler", "cosin", ["cosine", "poly"])
    assert str(error.value) == "--scheduler: expected one of cosine, poly; got 'cosin'; did you mean cosine?"


def test_check_choice_takes_choices_of_any_type_and_a_dict():
    assert check_choice("--depth", 50, (18, 50)) == 50
    assert check_choice("--amp-dtype", "float32", {"float32": None}) == "float32"
    with pytest.raises(ValueError, match="expected one of 18, 50; got 34"):
        check_choice("--depth", 34, (18, 50))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_check_range_includes_its_ends(value):
    assert check_range("dropout", value, 0.0, 1.0) == value


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_check_range_refuses_what_is_outside_and_nan(value):
    with pytest.raises(ValueError, match=f"dropout: expected a number from 0.0 to 1.0, got {value}"):
        check_range("dropout", value, 0.0, 1.0)


def test_nearest_is_best_first_and_empty_for_something_else():
    assert nearest("embed_dmi", ["embed_dim", "embed_size", "depth"])[0] == "embed_dim"
    assert nearest("zzz", ["embed_dim", "depth"]) == []
    assert nearest(7, [8, 9]) == []                            # keys of a YAML mapping need not be text


def test_did_you_mean():
    assert did_you_mean([]) == ""
    assert did_you_mean(["a", "b"]) == "; did you mean a or b?"


def test_show_writes_values_as_a_file_has_them_and_cuts_long_ones():
    assert [show(value) for value in (True, None, 1.5, "x")] == ["true", "null", "1.5", "'x'"]
    assert show(list(range(1000))) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16..."
