import json
import math
import time

import pytest
import yaml

from utils import config_file
from utils.config_file import read_mapping, read_yaml, to_plain, write_yaml


def write(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# -- numbers and text ----------------------------------------------------------


@pytest.mark.parametrize("text, value", [
    ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1.", 1.0), (".5", 0.5), ("1_000", 1000), ("0", 0), ("-7", -7),
    ("0x1F", 31), (".inf", math.inf), ("-.inf", -math.inf), ("1_0.5", 10.5), ("+3", 3),
])
def test_numbers(text, value):
    result = read_yaml(text)
    assert result == value and type(result) is type(value)


def test_nan_is_read():
    assert math.isnan(read_yaml(".nan"))


@pytest.mark.parametrize("text", ["010", "12:30", "1:2:3", "2024-01-31", "2024-01-31 10:00:00", "1e", "e5", "1.2.3",
                                  "-", "=", "0b11", "inf", "nan", "1-2", "+", ".", "_1"])
def test_text_that_only_looks_like_a_number_stays_text(text):
    assert read_yaml(f"a: {text}" if text != "-" else "a: '-'") == {"a": text}


def test_words_for_true_false_and_null():
    assert read_yaml("[yes, on, true, no, off, FALSE, null, ~, '']") == [True] * 3 + [False] * 3 + [None, None, ""]


def test_anchors_and_merge_keys_work_and_share_nothing(tmp_path):
    data = read_mapping(write(tmp_path, "base: &b {lr: 1, w: [1]}\nhead: {<<: *b, lr: 2}\nsame: *b\n"))
    assert data == {"base": {"lr": 1, "w": [1]}, "head": {"lr": 2, "w": [1]}, "same": {"lr": 1, "w": [1]}}
    data["same"]["w"].append(5)
    assert data["base"]["w"] == [1] and data["head"]["w"] == [1]


# -- files ---------------------------------------------------------------------


def test_the_same_mapping_from_all_formats(tmp_path):
    data = {"optim": {"lr": 0.001, "betas": [0.9, 0.999]}, "name": "a ü", "flag": True}
    paths = [write(tmp_path, json.dumps(data), "a.json"), write(tmp_path, yaml.safe_dump(data), "a.yml"),
             write(tmp_path, 'name = "a ü"\nflag = true\n[optim]\nlr = 1e-3\nbetas = [0.9, 0.999]\n', "a.toml")]
    assert [read_mapping(path) for path in paths] == [data] * 3


@pytest.mark.parametrize("name, text", [("a.yaml", ""), ("b.yaml", "# only a comment\n"), ("c.toml", ""),
                                        ("d.json", " \n"), ("e.yaml", "---\n"), ("f.json", "{}"), ("g.yaml", "\ufeff")])
def test_an_empty_file_is_an_empty_mapping(tmp_path, name, text):
    assert read_mapping(write(tmp_path, text, name)) == {}


@pytest.mark.parametrize("name, text", [("a.yaml", "a: 1"), ("a.toml", "a = 1"), ("a.json", '{"a": 1}')])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path, name, text):
    assert read_mapping(write(tmp_path, "\ufeff" + text, name)) == {"a": 1}


@pytest.mark.parametrize("name, text, message", [
    ("a.yaml", "a: 1\nb: 2\na: 3\n", "not valid YAML: line 3, column 1: key 'a' is given twice"),
    ("a.yaml", "s:\n  a: 1\n  'a': 2\n", "line 3, column 3: key 'a' is given twice"),
    ("a.yaml", "a: [1, 2", "not valid YAML: line 1"),
    ("a.yaml", "a:\n\tb: 1", "line 2, column 1: found character '\\t'"),
    ("a.yaml", "a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ("a.yaml", "? [a, b]\n: 1", "found unhashable key"),
    ("a.yaml", "a: 1\n---\nb: 2\n", "not valid YAML: line 2"),
    ("a.yaml", "a: *nowhere", "found undefined alias 'nowhere'"),
    ("a.yaml", "a: \x07", "unacceptable character"),
    ("a.yaml", "- 1\n- 2\n", "expected `key: value` lines at the top, got [1, 2]"),
    ("a.yaml", "just text", "at the top, got 'just text'"),
    ("a.yaml", "a: !!timestamp 2024-01-31", "(date) is no setting"),
    ("a.json", '{"a": 1, "a": 2}', "not valid JSON: key 'a' is given twice"),
    ("a.json", '{"a": 1,}', "line 1 column"),
    ("a.toml", "a = 1\na = 2\n", "Cannot overwrite a value"),
    ("a.toml", "a = 2024-01-31\n", "(date) is no setting"),
    ("a.txt", "a: 1", "expected a .yaml, .yml, .toml or .json file, got suffix '.txt'"),
    ("a.yaml", "a: " + "[" * 600, "nested too deep"),
    ("a.json", "[" * 100_000, "nested too deep"),
])
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, name, text, message):
    path = write(tmp_path, text, name)
    with pytest.raises(ValueError) as error:
        read_mapping(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_binary_and_missing_files_and_folders(tmp_path):
    path = tmp_path / "mesh.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="mesh.yaml: not UTF-8 text"):
        read_mapping(path)
    with pytest.raises(FileNotFoundError, match="mesj.yaml: no such settings file; did you mean mesh.yaml?"):
        read_mapping(tmp_path / "mesj.yaml")
    with pytest.raises(FileNotFoundError, match="no such settings file$"):
        read_mapping(tmp_path / "no" / "folder.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        read_mapping(tmp_path)


def test_a_large_file_is_refused_unread(tmp_path):
    path = write(tmp_path, "a: 1\n" + "# filler\n" * (config_file.MAX_BYTES // 9 + 1))
    with pytest.raises(ValueError, match="too large for settings"):
        read_mapping(path)


def test_alias_bombs_are_refused_quickly(tmp_path):
    nested = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    nested += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))  # 9 ** 30 values
    flat = "a: &a [" + "1, " * 5000 + "]\nb: [" + "*a, " * 5000 + "]\n"                          # 25 million
    merged = "a: &a {k: &k [1]}\nb: &b {c: *a, d: *b}\n"                                         # holds itself
    for text in (nested, flat, merged):
        start = time.process_time()
        with pytest.raises(ValueError, match="more than 100000 values once aliases"):
            read_mapping(write(tmp_path, text))
        assert time.process_time() - start < 5


# -- writing -------------------------------------------------------------------

VALUES = ["1e-4", "010", "12:30", "2024-01-31", "no", "null", "", "1", "1.5", ".inf", "a: b", "# x", "ü", " x ", "a\nb",
          "=", "0x1F", "1_000",
          "<<", "~", "*a", "&a", "!x", "-", "yes", 1e-4, 1e300, -0.0, math.inf, 5, True, None, [], {},
          [1, [2.5, "x"], {"a": None}], {"b": {"a": []}, "a": 1}, {0: "wall", 1: "floor"}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_is_written_reads_back_the_same(tmp_path, value):
    write_yaml({"key": value}, tmp_path / "a.yaml")
    back = read_mapping(tmp_path / "a.yaml")["key"]
    assert back == value and type(back) is type(value)
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == {"key": value}      # another reader sees the same


def test_order_layout_and_no_aliases(tmp_path):
    shared = [1, 2]
    write_yaml({"z": shared, "a": {"x": shared, "t": (3, 4)}}, tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == "z: [1, 2]\na:\n  x: [1, 2]\n  t: [3, 4]\n"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_yaml({"a": 1}, tmp_path / "a.yaml")
    with pytest.raises(ValueError, match=r"<object object at .* \(object\) is no setting"):
        write_yaml({"a": object()}, tmp_path / "a.yaml")

    def no_space(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_yaml({"a": 2}, tmp_path / "a.yaml")
    assert read_mapping(tmp_path / "a.yaml") == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


def test_to_plain_copies():
    data = {"a": [{"b": 1}], "c": (1, 2)}
    copy = to_plain(data)
    copy["a"][0]["b"] = 2
    assert data["a"][0]["b"] == 1 and copy["c"] == [1, 2]
