"""The Point Transformer V3 networks whose weights are released, or whose distillation configs are: sizes and decoders.

Sonata (github.com/facebookresearch/sonata), Concerto and Utonia (github.com/Pointcept), all Apache-2.0 code. Concerto's
base and small have Sonata's sizes; Utonia rotates queries and keys (models/point_rotary.py) and has heads of 18
channels. The numbers are those of the official configs; the released files themselves were not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

ORDER = ("z", "z-trans", "hilbert", "hilbert-trans")
PATCH_SIZE = 1024
ROTATION = {"rope_base": 10.0, "jitter_coords": 1.1, "rescale_coords": 1.2}     # of all published Utonia configs


class Network(NamedTuple):
    """One size: blocks, channels and heads of the stages, finest first; channels and heads of the official decoder
    (two blocks a stage) where its dec and ft configs have one; whether it rotates; whose files have this size."""

    enc_depths: tuple[int, ...]
    enc_channels: tuple[int, ...]
    enc_num_head: tuple[int, ...]
    dec_channels: tuple[int, ...] | None
    dec_num_head: tuple[int, ...] | None
    rotates: bool
    owner: str


_BASE_DECODER = ((64, 96, 192, 384), (4, 6, 12, 24))
NETWORKS = {
    "sonata": Network((3, 3, 3, 12, 3), (48, 96, 192, 384, 512), (3, 6, 12, 24, 32), *_BASE_DECODER, False,
                      "Sonata or Concerto base"),
    "sonata_small": Network((2, 2, 2, 6, 2), (32, 64, 128, 256, 512), (2, 4, 8, 16, 32), None, None, False,
                            "Sonata small or Concerto small"),
    "concerto_large": Network((3, 3, 3, 12, 3), (64, 128, 256, 512, 768), (4, 8, 16, 32, 48), *_BASE_DECODER, False,
                              "Concerto large"),
    "utonia": Network((3, 3, 3, 12, 3), (54, 108, 216, 432, 576), (3, 6, 12, 24, 32), (54, 108, 216, 432),
                      (3, 6, 12, 24), True, "Utonia"),
    "utonia_small": Network((2, 2, 2, 6, 2), (36, 72, 144, 288, 432), (2, 4, 8, 16, 24), None, None, True,
                            "Utonia small"),
    "utonia_tiny": Network((2, 2, 2, 6, 2), (18, 36, 72, 144, 216), (1, 2, 4, 8, 12), None, None, True, "Utonia tiny"),
}


def network_config(name: str, **changes: Any) -> dict[str, Any]:
    """The constructor's arguments of a network of NETWORKS, an encoder alone, as its weight file stores them."""
    network = NETWORKS[name]
    stages = len(network.enc_depths)
    config = {"in_channels": 9, "order": list(ORDER), "enc_depths": list(network.enc_depths),
              "enc_channels": list(network.enc_channels), "enc_num_head": list(network.enc_num_head),
              "enc_patch_size": [PATCH_SIZE] * stages, "drop_path": 0.3, "mask_token": True, "enc_mode": True}
    return {**config, **(ROTATION if network.rotates else {}), **changes}


def network_name(config: Mapping[str, Any]) -> str | None:
    """The name in NETWORKS of the network that a config describes; None for any other."""
    def same(network: Network) -> bool:
        return network.rotates == bool(config.get("rope_base")) and all(
            list(getattr(network, key)) == config.get(key) or getattr(network, key) == config.get(key)
            for key in ("enc_depths", "enc_channels", "enc_num_head"))
    return next((name for name, network in NETWORKS.items() if same(network)), None)


def decoder_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """(dec_ arguments for an encoder's config, whether they are official).

    Official where the encoder is one of NETWORKS that has a decoder. Else: two blocks a stage and the encoder's own
    patches; an encoder that rotates gets its own widths and heads again, as Utonia does; another gets 64 channels at
    the finest stage, the encoder's width at the others, and heads of 16 channels.
    """
    network = NETWORKS.get(network_name(config) or "")
    official = network is not None and network.dec_channels is not None
    if official:
        channels, heads = list(network.dec_channels), list(network.dec_num_head)
    elif config.get("rope_base"):
        channels, heads = list(config["enc_channels"][:-1]), list(config["enc_num_head"][:-1])
    else:
        channels = [64, *config["enc_channels"][1:]][:-1]
        heads = [width // 16 for width in channels]
    return {"dec_depths": [2] * len(channels), "dec_channels": channels, "dec_num_head": heads,
            "dec_patch_size": list(config["enc_patch_size"][:-1])}, official


def describe_network(config: Mapping[str, Any], mode: str = "lin") -> list[str]:
    """Lines for the log about a pre-trained encoder: whose size it has, whether it rotates, what its licence says, and
    in modes with a decoder where the decoder's widths come from."""
    name = network_name(config)
    size = " ".join(map(str, config["enc_channels"]))
    lines = [f"network: the size of {NETWORKS[name].owner} ({size})" if name else
             f"network: of no released size ({size})"]
    if config.get("rope_base"):
        lines[0] += (f", positions in metres turn queries and keys (base {config['rope_base']:g}; jitter_coords "
                     f"{config.get('jitter_coords')}, rescale_coords {config.get('rescale_coords')} in training)")
    if name:
        lines.append("licence: the READMEs of Sonata, Concerto and Utonia say CC BY-NC 4.0 for their weights; the "
                     "listing of Concerto and Utonia on Hugging Face is tagged Apache-2.0. See docs/sonata.md")
    if mode in ("dec", "ft"):
        decoder, official = decoder_of(config)
        given = config.get("dec_channels")
        source = "given in the config" if given else "the official one" if official else "not official: none is known"
        lines.append(f"decoder: {' '.join(map(str, given or decoder['dec_channels']))} channels, {source}")
    return lines


def data_warning(config: Mapping[str, Any], grid_size: float, scale: float | str) -> str | None:
    """A line where the voxels are not those that a released network was pre-trained on, else None: its numbers would be
    plausible and worse. Utonia: 0.01 after a scale (0.5 indoors, 0.2 outdoors, objects to radius 1); others: 0.02."""
    name = network_name(config)
    if name is None:
        return None
    rotates = NETWORKS[name].rotates
    expected = 0.01 if rotates else 0.02
    near = expected / 1.3 < grid_size < expected * 1.3      # pre-training varies sizes by 10 %, and more
    if near and (rotates or scale == 1):
        return None
    advice = "data.grid_size=0.01 with data.scale 0.5 for rooms, 0.2 for outdoor scans, object for single objects" \
        if rotates else "data.grid_size=0.02 with data.scale=1"
    return (f"WARNING: the size of {NETWORKS[name].owner}, but data.grid_size={grid_size:g} and data.scale={scale}; it "
            f"was pre-trained with {advice}")
