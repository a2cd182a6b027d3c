import copy
import math
import pickle

import pytest

from utils.checks import check_choice
from utils.config import Config, Required, Setting, load_config, override_config, save_config

DEFAULTS = {
    "data": {"root": "datasets/mesh", "num_points": 4096, "scale": [0.8, 1.2], "files": [], "flip": True},
    "optim": {
        "lr": 1e-3,
        "clip": Setting(None, (float,)),
        "schedule": Setting("cosine", (str,), ("cosine", "poly")),
        "losses": Setting(["ce"], (list,), ("ce", "dice")),
        "last_layers": Setting("all", (int, str)),
    },
    "encoder_args": {},
    "seed": 0,
}


def load(tmp_path, text="", overrides=(), defaults=DEFAULTS):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, defaults, overrides)


def message(tmp_path, text="", overrides=(), defaults=DEFAULTS):
    with pytest.raises(ValueError) as error:
        load(tmp_path, text, overrides, defaults)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(tmp_path / "run.yaml"), "FILE")


# -- what is accepted ----------------------------------------------------------


def test_an_empty_file_gives_all_defaults(tmp_path):
    assert load(tmp_path).to_dict() == {
        "data": {"root": "datasets/mesh", "num_points": 4096, "scale": [0.8, 1.2], "files": [], "flip": True},
        "optim": {"lr": 1e-3, "clip": None, "schedule": "cosine", "losses": ["ce"], "last_layers": "all"},
        "encoder_args": {}, "seed": 0}


def test_an_empty_section_gives_its_defaults(tmp_path):
    assert load(tmp_path, "data:\nencoder_args:\n") == load(tmp_path)


def test_file_over_defaults_and_overrides_over_both(tmp_path):
    overrides = ["optim.lr=1e-4", "data.scale=[1, 2]", "seed=4", "seed=5"]
    config = load(tmp_path, "optim: {lr: 0.1, clip: 1}\nseed: 3\n", overrides)
    assert (config.optim.lr, config.optim.clip, config.optim.schedule) == (1e-4, 1.0, "cosine")
    assert config.seed == 5 and config.data.scale == [1.0, 2.0]


def test_an_integer_becomes_a_float_where_the_default_is_one(tmp_path):
    config = load(tmp_path, "optim: {lr: 1, clip: 2}\ndata: {scale: [1, 1e1]}")
    assert [type(value) for value in (config.optim.lr, config.optim.clip, *config.data.scale)] == [float] * 4


def test_several_types_keep_the_given_one(tmp_path):
    for value in (2, "all"):
        assert load(tmp_path, f"optim: {{last_layers: {value}}}").optim.last_layers == value
    both = {"k": Setting(1, (int, float, type(None)))}
    kinds = [type(load(tmp_path, f"k: {text}", defaults=both).k) for text in ("2", "2.0", "null")]
    assert kinds == [int, float, type(None)]


def test_null_is_allowed_by_a_none_default_or_by_its_type_whatever_the_choices(tmp_path):
    defaults = {"a": Setting(None, str, ("x",)), "b": Setting("x", (str, type(None)), ("x",)), "c": Setting("x", str)}
    assert load(tmp_path, "{a: null, b: null}", defaults=defaults).to_dict() == {"a": None, "b": None, "c": "x"}
    assert message(tmp_path, "c: null", defaults=defaults) == "FILE: c: expected text, got null"


def test_a_free_mapping_takes_anything_and_overrides_merge_into_it(tmp_path):
    overrides = ["encoder_args.init.mode=x", "encoder_args.a.b=1"]
    config = load(tmp_path, "encoder_args: {depth: 2, init: {scale: 1e-5}}", overrides)
    assert config.encoder_args.to_dict() == {"depth": 2, "init": {"scale": 1e-5, "mode": "x"}, "a": {"b": 1}}
    assert config.encoder_args.init.mode == "x"


def test_an_override_may_hold_a_mapping_or_an_equals_sign(tmp_path):
    config = load(tmp_path, "", ["optim={lr: 2, schedule: poly}", "data.root=a=b", "optim.clip="])
    assert (config.optim.lr, config.optim.schedule, config.optim.clip, config.data.root) == (2.0, "poly", None, "a=b")


def test_toml_and_json(tmp_path):
    for name, text in (("a.toml", "seed = 2\n[optim]\nlr = 1e-4\n"), ("a.json", '{"seed": 2, "optim": {"lr": 1e-4}}')):
        (tmp_path / name).write_text(text)
        assert load_config(tmp_path / name, DEFAULTS) == load(tmp_path, "seed: 2\noptim: {lr: 1e-4}")


def test_defaults_stay_as_they_were(tmp_path):
    before = copy.deepcopy(DEFAULTS)
    config = load(tmp_path, "encoder_args: {a: 1}")
    config.data.scale.append(3.0)
    config.data.files.append("x")
    config.encoder_args.b = 2
    assert DEFAULTS == before and load(tmp_path).data.scale == [0.8, 1.2]


def test_a_tuple_default_is_a_list(tmp_path):
    defaults = {"size": (512, 512), "grid": [[1, 2]]}
    assert load(tmp_path, defaults=defaults).to_dict() == {"size": [512, 512], "grid": [[1, 2]]}
    assert load(tmp_path, "size: [64, 32]\ngrid: [[3], []]", defaults=defaults).grid == [[3], []]
    assert "grid[1][0]: expected an integer, got 'x'" in message(tmp_path, "grid: [[3], [x]]", defaults=defaults)


def test_items_of_other_types_than_the_defaults(tmp_path):
    defaults = {"ignore": Setting([-1], (list,), items=(int, str)), "range": Setting(None, (float, list), items=(float,))}
    config = load(tmp_path, "ignore: [255, nan]\nrange: [-1, 1]", defaults=defaults)
    assert config.ignore == [255, "nan"] and config.range == [-1.0, 1.0] and type(config.range[0]) is float
    assert load(tmp_path, defaults=defaults).ignore == [-1]
    assert "ignore[0]: expected an integer or text, got 0.5" in message(tmp_path, "ignore: [0.5]", defaults=defaults)
    assert "range[0]: expected a number, got 'a'" in message(tmp_path, "range: [a, 1]", defaults=defaults)


def test_items_of_a_mixed_list_are_free_or_numbers(tmp_path):
    assert load(tmp_path, "k: [z, 3]", defaults={"k": [1, "a"]}).k == ["z", 3]
    assert load(tmp_path, "k: [3, 4]", defaults={"k": [1, 0.5]}).k == [3.0, 4.0]


# -- errors --------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("optim: {lrr: 1}", "FILE: unknown key optim.lrr; did you mean optim.lr?"),
    ("lr: 1", "FILE: unknown key lr; did you mean optim.lr?"),
    ("optm: {lr: 1}", "FILE: unknown section optm; did you mean optim?"),
    ("data: {lr: 1}", "FILE: unknown key data.lr; did you mean optim.lr?"),
    ("data: {zzz: 1}", "FILE: unknown key data.zzz; data has root, num_points, scale, files, flip"),
    ("zzz: 1", "FILE: unknown key zzz; the top level has data, optim, encoder_args, seed"),
    ("3: 1", "FILE: unknown key 3; the top level has data, optim, encoder_args, seed"),
    ("optim.lr: 1", "FILE: unknown key optim.lr; did you mean optim?"),
    ("optim: 3", "FILE: optim: expected a section (`key: value` lines below it), got 3"),
    ("encoder_args: [1]", "FILE: encoder_args: expected a section (`key: value` lines below it), got [1]"),
    ("data: {num_points: 1.5}", "FILE: data.num_points: expected an integer, got 1.5"),
    ("data: {num_points: 1e3}", "FILE: data.num_points: expected an integer, got 1000.0"),
    ("data: {num_points: true}", "FILE: data.num_points: expected an integer, got true"),
    ("data: {num_points: null}", "FILE: data.num_points: expected an integer, got null"),
    ("data: {num_points: '12'}", "FILE: data.num_points: expected an integer, got '12'"),
    ("data: {num_points: [1]}", "FILE: data.num_points: expected an integer, got [1]"),
    ("data: {num_points: {a: 1}}", "FILE: data.num_points: expected an integer, got {'a': 1}"),
    ("data: {flip: 1}", "FILE: data.flip: expected true or false, got 1"),
    ("data: {root: 12}", "FILE: data.root: expected text, got 12; put it in quotes to make it text"),
    ("data: {root: no}", "FILE: data.root: expected text, got false; put it in quotes to make it text "
                         "(YAML reads no, off as false and yes, on as true)"),
    ("data: {scale: 1}", "FILE: data.scale: expected a list, got 1"),
    ("data: {scale: [1, two]}", "FILE: data.scale[1]: expected a number, got 'two'"),
    ("optim: {lr: true}", "FILE: optim.lr: expected a number, got true"),
    ("optim: {lr: .nan}", "FILE: optim.lr: expected a number, got nan"),
    ("optim: {clip: x}", "FILE: optim.clip: expected a number or null, got 'x'"),
    ("optim: {last_layers: 1.5}", "FILE: optim.last_layers: expected an integer or text, got 1.5; "
                                  "put it in quotes to make it text"),
    ("optim: {schedule: cosin}", "FILE: optim.schedule: expected one of cosine, poly; got 'cosin'; "
                                 "did you mean cosine?"),
    ("optim: {losses: [ce, dise]}", "FILE: optim.losses: expected one of ce, dice; got 'dise'; did you mean dice?"),
])
def test_errors_in_the_file(tmp_path, text, expected):
    assert message(tmp_path, text) == expected


@pytest.mark.parametrize("override, expected", [
    ("optim.lr", "override 'optim.lr': expected section.key=value"),
    ("=3", "override '=3': expected section.key=value"),
    ("optim..lr=3", "override 'optim..lr=3': expected section.key=value"),
    ("--optim.lr=3", "override '--optim.lr=3': expected section.key=value"),
    ("optim.lr=[1", "override 'optim.lr=[1': not valid YAML: line 1, column 3: expected ',' or ']', "
                    "but got '<stream end>'"),
    ("optim.lr=fast", "override 'optim.lr=fast': optim.lr: expected a number, got 'fast'"),
    ("optim.l=3", "override 'optim.l=3': unknown key optim.l; did you mean optim.lr?"),
    ("optm.lr=3", "override 'optm.lr=3': unknown section optm; did you mean optim?"),
    ("seed.x=3", "override 'seed.x=3': seed: expected an integer, got {'x': 3}"),
    ("optim.schedule=x", "override 'optim.schedule=x': optim.schedule: expected one of cosine, poly; got 'x'"),
])
def test_errors_in_an_override(tmp_path, override, expected):
    assert message(tmp_path, "", [override]) == expected


def test_all_missing_required_settings_are_named_at_once(tmp_path):
    defaults = {"data": {"train": Required(str), "val": Required((str, list)), "n": 1}, "classes": Required(int)}
    assert message(tmp_path, "data: {val: b}", defaults=defaults) == (
        "FILE: required but not given: data.train, classes; add them to the file or as KEY=VALUE")
    config = load(tmp_path, "data: {train: a}", ["data.val=[x]", "classes=20"], defaults)
    assert config.to_dict() == {"data": {"train": "a", "val": ["x"], "n": 1}, "classes": 20}


def test_a_required_setting_is_checked_like_any_other(tmp_path):
    defaults = {"train": Required(str), "mode": Required((str,), ("a", "b"))}
    assert "train: expected text, got 3" in message(tmp_path, "train: 3", defaults=defaults)
    assert "train: expected text, got null" in message(tmp_path, "train:", defaults=defaults)
    assert "mode: expected one of a, b; got 'c'" in message(tmp_path, "mode: c", defaults=defaults)


def test_mistakes_in_the_defaults_are_the_scripts_own(tmp_path):
    with pytest.raises(AssertionError, match="default None gives no type; write Setting"):
        load(tmp_path, "a: 1", defaults={"a": None})
    with pytest.raises(AssertionError, match="data.items would hide a method of dict"):
        load(tmp_path, defaults={"data": {"items": 3}})


# -- settings from a checkpoint ------------------------------------------------


def test_settings_loaded_before_are_changed_in_a_copy_and_completed(tmp_path):
    saved = {"data": {"num_points": 7, "files": ["a"]}, "encoder_args": {"depth": 2}}        # an older version's
    config = override_config(saved, DEFAULTS, ["optim.lr=2", "encoder_args.width=3"])
    assert config == load(tmp_path, "data: {num_points: 7, files: [a]}\noptim: {lr: 2}\nencoder_args: {depth: 2, width: 3}")
    config.data.files.append("b")
    assert saved == {"data": {"num_points": 7, "files": ["a"]}, "encoder_args": {"depth": 2}}
    assert override_config(config, DEFAULTS, []) == config


@pytest.mark.parametrize("saved, overrides, expected", [
    ({"optim": {"lrr": 1}}, [], "the settings in the checkpoint: unknown key optim.lrr; did you mean optim.lr?"),
    ({}, ["seed=x"], "override 'seed=x': seed: expected an integer, got 'x'"),
    ({}, [], "the settings in the checkpoint: required but not given: train; add them to the file or as KEY=VALUE"),
])
def test_errors_in_settings_from_a_checkpoint(saved, overrides, expected):
    with pytest.raises(ValueError) as error:
        override_config(saved, {**DEFAULTS, "train": Required(str)}, overrides)
    assert str(error.value) == expected


# -- Config --------------------------------------------------------------------


def test_attributes_at_every_depth():
    config = Config({"model": {"embed_dim": 8}}, seed=1)
    config.model.depth = 2
    config["data"] = {"root": "x"}
    config.update(run={"debug": False})
    assert (config.model.embed_dim, config["model"]["depth"], config.data.root, config.run.debug) == (8, 2, "x", False)
    assert list(config) == ["model", "seed", "data", "run"]


def test_a_missing_attribute_is_named_with_the_nearest():
    config = Config({"embed_dim": 8})
    with pytest.raises(AttributeError) as error:
        _ = config.embed_dmi
    assert str(error.value) == "config has no key 'embed_dmi'; did you mean embed_dim?"
    assert not hasattr(config, "depth") and getattr(config, "depth", 3) == 3


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), Config.copy])
def test_copies_are_equal_configs(duplicate):
    config = Config({"a": {"b": [1, {"c": 2}]}})
    other = duplicate(config)
    assert other == config and type(other) is Config and type(other.a) is Config
    other.new = 1
    assert "new" not in config


def test_a_deep_copy_and_to_dict_share_nothing():
    config = Config({"a": {"b": [1]}, "t": (1, 2)})
    deep, plain = copy.deepcopy(config), config.to_dict()
    deep.a.b.append(2)
    plain["a"]["b"].append(3)
    assert config.a.b == [1] and plain["t"] == [1, 2]
    assert type(plain) is dict and type(plain["a"]) is dict


def test_to_dict_refuses_what_a_checkpoint_cannot_hold():
    with pytest.raises(ValueError, match=r"\(complex\) is no setting"):
        Config({"a": [1j]}).to_dict()


# -- saving --------------------------------------------------------------------


def test_a_saved_config_loads_back_the_same(tmp_path):
    config = load(tmp_path, "optim: {lr: 1e-7, clip: .inf}\ndata: {root: '010', files: ['1e-4', 'no', ü]}",
                  ["encoder_args.x={a: [1, null]}"])
    save_config(config, tmp_path / "out.yaml")
    back = load_config(tmp_path / "out.yaml", DEFAULTS)
    assert back == config and back.optim.clip == math.inf and list(back) == list(config)


def test_the_specified_names_are_here():
    assert check_choice("x", 1, [1]) == 1
    assert Setting("a", (str,)) == Setting(default="a", types=(str,), choices=None)


def test_a_whole_number_beyond_all_floats_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(f"optimizer: {{learning_rate: {'9' * 400}}}\n")
    with pytest.raises(ValueError, match=r"c.yaml: optimizer.learning_rate: a whole number of 1329 bits is too large"):
        load_config(tmp_path / "c.yaml", {"optimizer": {"learning_rate": 0.1}}, [])


def test_an_unknown_key_cannot_break_the_line(tmp_path):
    (tmp_path / "c.json").write_text('{"\\ud800\\u001b[2J": 1}')
    with pytest.raises(ValueError, match=r"c.json: unknown key \\ud800\\x1b\[2J; the top level has a"):
        load_config(tmp_path / "c.json", {"a": 1}, [])
