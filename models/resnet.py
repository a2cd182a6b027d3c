"""ResNet encoders (He et al. 2016) with torchvision's names, as feature pyramids: no pooling and no classifier.

Stride 2 sits in the 3x3 convolution of a bottleneck, where torchvision has it. Any size of image: sides are rounded up
at each halving.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from utils.weights import load_weights, read_weights, strip_prefixes

URL = "https://download.pytorch.org/models/"                # torchvision's IMAGENET1K_V1 weights
FILES = {"resnet18": "resnet18-f37072fd.pth", "resnet34": "resnet34-b627a593.pth", "resnet50": "resnet50-0676ba61.pth",
         "resnet101": "resnet101-63fe2227.pth"}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in_channels, h, w) -> (B, width, h / stride, w / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: (B, in_channels, h, w) -> (B, 4 width, h / stride, w / stride)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """image (B, in_channels, H, W) normalised -> five maps at strides 2, 4, 8, 16, 32 with `channels` channels.

    width: channels of the first stage, 64 in all published ones. Kaiming initialisation (fan out) of the convolutions,
    norms 1 and 0, as torchvision has it.
    """

    def __init__(self, block: type[nn.Module], depths: tuple[int, ...], in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 8 * width)
        self.channels = [width, *(channels * block.expansion for channels in widths)]
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, (channels, depth) in enumerate(zip(widths, depths, strict=True)):
            layers = [block(self.channels[i], channels, 1 if i == 0 else 2)]
            layers += [block(channels * block.expansion, channels, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [self.relu(self.bn1(self.conv1(image)))]                      # (B, 64, H/2, W/2)
        x = self.maxpool(features[0])                                            # (B, 64, H/4, W/4)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


# A new encoder is one entry: a function of in_channels that gives a module with `channels` and a list of feature maps.
ENCODERS = {
    "resnet18": lambda in_channels=3: ResNet(BasicBlock, (2, 2, 2, 2), in_channels),
    "resnet34": lambda in_channels=3: ResNet(BasicBlock, (3, 4, 6, 3), in_channels),
    "resnet50": lambda in_channels=3: ResNet(Bottleneck, (3, 4, 6, 3), in_channels),
    "resnet101": lambda in_channels=3: ResNet(Bottleneck, (3, 4, 23, 3), in_channels),
}


def adapt_input(weight: Tensor, in_channels: int) -> Tensor:
    """The first convolution (O, 3, k, k) of an RGB network for other channels (O, in_channels, k, k), by the rule of
    segmentation_models.pytorch: one channel gets the sum of the three kernels, others repeat them, times 3 / n."""
    if in_channels == weight.shape[1]:
        return weight
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_channels) % weight.shape[1]] * (weight.shape[1] / in_channels)


def read_resnet_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """(state dict in the names of ResNet, names that were dropped: the classifier) of a torchvision file, or one with
    its names inside `state_dict` or `model`, or behind the prefixes module., _orig_mod. and encoder."""
    state = read_weights(path)
    state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    state = strip_prefixes(state, ("module.", "_orig_mod.", "encoder."))
    dropped = [name for name in state if name.startswith("fc.")]
    return {name: value for name, value in state.items() if name not in dropped}, dropped


def load_resnet_weights(encoder: ResNet, path: str | Path) -> str:
    """Load a torchvision file, all of it but the classifier; returns the line for the log. ValueError where a tensor is
    missing, of another shape or too many: the file is of another ResNet."""
    state, dropped = read_resnet_weights(path)
    unexpected = [name for name in state if name not in encoder.state_dict()]
    if unexpected and "conv1.weight" in state:
        raise ValueError(f"{path}: {len(unexpected)} tensors that this encoder does not have ({unexpected[0]}, ...); "
                         f"is the file of another ResNet? Set model.backbone to that one")
    if "conv1.weight" in state:
        state["conv1.weight"] = adapt_input(state["conv1.weight"], encoder.conv1.in_channels)
    return load_weights(encoder, state, path, layout="torchvision") + \
        (f"; dropped {', '.join(dropped)}, the classifier" if dropped else "")
