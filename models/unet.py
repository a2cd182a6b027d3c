"""U-Net (Ronneberger et al. 2015) on an encoder, in the layout and the names of segmentation_models.pytorch, so that
its checkpoints load.

Five blocks go from stride 32 back to the image: resize (nearest) to the size of the next finer map, put that behind
it, two 3x3 convolutions. They resize to the size the map really has, so that images of any size work.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import adapt_input
from utils.params import freeze
from utils.weights import load_weights, read_weights, strip_prefixes

DECODER_CHANNELS = (256, 128, 64, 32, 16)
HEAD = "segmentation_head."


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels),
                         nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    """x (B, in_channels, h, w), skip (B, skip_channels, *size) or None -> (B, out_channels, *size)."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_block(in_channels + skip_channels, out_channels)
        self.conv2 = conv_block(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(x, size, mode="nearest")
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


class UNetDecoder(nn.Module):
    """Five feature maps at strides 2 to 32 and the size of the image -> (B, DECODER_CHANNELS[-1], H, W)."""

    def __init__(self, encoder_channels: list[int]) -> None:
        super().__init__()
        skips = [*encoder_channels[-2::-1], 0]
        inputs = [encoder_channels[-1], *DECODER_CHANNELS[:-1]]
        self.blocks = nn.ModuleList(DecoderBlock(*sizes) for sizes in zip(inputs, skips, DECODER_CHANNELS, strict=True))

    def forward(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        x, *skips = features[::-1]
        for block, skip in zip(self.blocks, [*skips, None], strict=True):
            x = block(x, skip, size if skip is None else skip.shape[-2:])
        return x


class UNet(nn.Module):
    """image (B, in_channels, H, W) normalised, any size -> logits (B, num_classes, H, W).

    encoder: a module with `channels` that gives five maps at strides 2 to 32 (models/resnet.py). dropout drops whole
    channels before the head. A frozen encoder keeps the statistics of its norms, whatever train() says.
    Deviation: the original crops unpadded maps; here, as in segmentation_models.pytorch, everything is padded.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, dropout: float = 0.0,
                 freeze_encoder: bool = False) -> None:
        super().__init__()
        self.encoder, self.freeze_encoder = freeze(encoder) if freeze_encoder else encoder, freeze_encoder
        self.decoder = UNetDecoder(encoder.channels)
        self.dropout = nn.Dropout2d(dropout)
        self.segmentation_head = nn.Sequential(nn.Conv2d(DECODER_CHANNELS[-1], num_classes, 3, padding=1))
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.xavier_uniform_(self.segmentation_head[0].weight)
        nn.init.zeros_(self.segmentation_head[0].bias)

    def train(self, mode: bool = True) -> UNet:
        super().train(mode)
        self.encoder.train(mode and not self.freeze_encoder)
        return self

    def forward(self, image: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            features = self.encoder(image)
        x = self.decoder(features, image.shape[-2:])                             # (B, 16, H, W)
        return self.segmentation_head(self.dropout(x))

    def scores(self, image: Tensor) -> Tensor:
        return self(image)


def is_unet(state: dict) -> bool:
    return any(name.startswith("decoder.") for name in state)


def read_unet_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict in the names of UNet: a file, with the weights in `state_dict` or `model` or as they are, behind the
    prefixes module., _orig_mod. or model.; or a Hub folder of config.json and model.safetensors. ValueError for another
    architecture and for scSE attention, which this U-Net does not have."""
    path = Path(path)
    if path.is_dir() and (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        for key, ours in (("_model_class", "Unet"), ("decoder_interpolation", "nearest")):
            if config.get(key, ours) != ours:
                raise ValueError(f"{path}: {key} is {config[key]!r} in config.json; only {ours!r} is read")
        path = path / "model.safetensors"
    state = read_weights(path)
    state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    state = strip_prefixes(state, ("module.", "_orig_mod.", "model."))
    if any(".attention" in name for name in state):
        raise ValueError(f"{path}: a U-Net with scSE attention (decoder_attention_type), which is not supported here; "
                         f"export one without")
    return state


def load_unet_weights(model: UNet, path: str | Path) -> str:
    """Load a U-Net with the same encoder; returns the line for the log. Only the head may be of other classes: it keeps
    its start then, and the line says so. Everything else that differs is a ValueError."""
    state, own = read_unet_weights(path), model.state_dict()
    unexpected = [name for name in state if name not in own]
    if unexpected and is_unet(state):
        raise ValueError(f"{path}: {len(unexpected)} tensors that this U-Net does not have ({unexpected[0]}, ...); is "
                         f"its encoder another one? Set model.backbone to that one")
    first = "encoder.conv1.weight"
    if first in state and first in own:
        state[first] = adapt_input(state[first], own[first].shape[1])
    differing = [name for name in own if name.startswith(HEAD) and
                 (name not in state or state[name].shape != own[name].shape)]
    for name in differing:
        state[name] = own[name]
    line = load_weights(model, state, path, what="model", layout="segmentation_models.pytorch")
    return line + (f"; WARNING: but not the head, which is for other classes there and starts from random values "
                   f"({', '.join(differing)})" if differing else "")
