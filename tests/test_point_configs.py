"""The configs for Concerto and Utonia: each mode that a header promises loads, with the voxels the network was pre-trained on."""

import re
from pathlib import Path

import pytest

import train_sonata as SCRIPT
from models.point_networks import data_warning, network_config
from utils.config import load_config

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "sonata"
FILES = sorted([*FOLDER.glob("concerto-*.yaml"), *FOLDER.glob("utonia-*.yaml")])


def modes(path):
    """{mode: overrides} of the header."""
    lines = re.findall(r"^#   (lin|dec|ft|lora) +(.*)$", path.read_text(), re.MULTILINE)
    return {mode: [] if rest.startswith("(") else rest.split() for mode, rest in lines}


def test_there_is_one_for_each_network_and_data_set():
    assert [path.stem for path in FILES] == [f"{name}-{data}" for name in ("concerto", "utonia") for data in ("s3dis", "scannet", "scannet200")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_mode_of_the_header_loads(path):
    assert list(modes(path)) == ["lin", "dec", "ft", "lora"]
    for mode, overrides in modes(path).items():
        config = load_config(path, SCRIPT.DEFAULTS, overrides)
        SCRIPT.check_config(config)
        assert config.model.mode == mode and config.data.missing_normal == config.data.missing_color == "zeros"
        assert config.optimizer.block_lr == pytest.approx(config.optimizer.lr / 10)
        network = network_config("utonia" if path.stem.startswith("utonia") else "concerto_large")
        assert data_warning(network, config.data.grid_size, config.data.scale) is None
        spec = SCRIPT.point_spec(config)
        room = spec.grid_size / spec.scale                   # a voxel of the room, and lengths of the augmentation there
        assert room == pytest.approx(0.02) and config.augmentation.jitter / spec.scale == pytest.approx(0.005)
        assert [step[0] / spec.scale for step in config.augmentation.elastic] == pytest.approx([0.2, 0.8])
