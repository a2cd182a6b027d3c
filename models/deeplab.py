"""DeepLab v2 (Chen et al. 2018) on a dilated ResNet, its multi-scale container, and the weight files there are for it.

Wiring and names of parameters as in deeplab-pytorch (MIT), whose files load strictly. No torchvision needed.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import adapt_input
from utils.weights import load_weights, read_weights, strip_prefixes

ASPP_DILATIONS = (6, 12, 18, 24)
STAGES = ("layer1", "layer2", "layer3", "layer4", "layer5")      # all but ASPP: what a classification network also has


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, and a ReLU unless relu is False. Keeps the size at stride 1."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, dilation: int = 1,
                 relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, dilation * (kernel_size // 2), dilation,
                              bias=False)
        # Upstream's momentum is 0.001, for statistics that are never trained; ours is torch's, to train from scratch.
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x.relu_() if self.relu else x


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside the identity, or a 1x1 convolution in the first block of a stage."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dilation: int, first: bool,
                 stride_in_1x1: bool):
        super().__init__()
        width = out_channels // 4
        strides = (stride, 1) if stride_in_1x1 else (1, stride)
        self.reduce = ConvBN(in_channels, width, stride=strides[0])
        self.conv3x3 = ConvBN(width, width, 3, strides[1], dilation)
        self.increase = ConvBN(width, out_channels, relu=False)
        self.shortcut = ConvBN(in_channels, out_channels, stride=stride, relu=False) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.increase(self.conv3x3(self.reduce(x))) + self.shortcut(x)).relu_()


class Stem(nn.Sequential):
    """7x7 convolution and pooling that rounds sizes up: (B, in_channels, H, W) -> (B, C, about H/4, W/4)."""

    def __init__(self, out_channels: int, in_channels: int = 3):
        super().__init__()
        self.add_module("conv1", ConvBN(in_channels, out_channels, 7, 2))
        self.add_module("pool", nn.MaxPool2d(3, 2, 1, ceil_mode=True))


class ASPP(nn.Module):
    """Four parallel dilated 3x3 convolutions with bias, summed; neither norm nor activation."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        for i, dilation in enumerate(ASPP_DILATIONS):
            conv = nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
            self.add_module(f"c{i}", conv)

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self.children())


class DeepLabV2(nn.Sequential):
    """forward(image (B, 3, H, W)) -> (B, out_channels, h, w), a cell for every 8 pixels: 513 and 512 both give 65.

    n_blocks are the blocks of the four residual stages, (3, 4, 23, 3) for ResNet-101; base_width is the number of
    channels of the stem, to which all others are in proportion (64: 256, 512, 1024, 2048). Weights start from Kaiming's
    initialisation, ASPP from normal values of deviation 0.01. The one stage with stride has it in the first 1x1
    convolution, as Caffe's ResNet and the paper; torchvision's weights were trained with it in the 3x3 one
    (stride_in_1x1 False). Both take the same files.
    """

    def __init__(self, out_channels: int = 64, n_blocks: Sequence[int] = (3, 4, 23, 3), base_width: int = 64,
                 stride_in_1x1: bool = True, in_channels: int = 3):
        super().__init__()
        if len(n_blocks) != 4 or min(n_blocks) < 1:
            raise ValueError(f"n_blocks is {list(n_blocks)}; give four numbers of blocks, each at least 1")
        self.layer1 = Stem(base_width, in_channels)
        channels = base_width
        for stage, (count, stride, dilation) in enumerate(zip(n_blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            width = 4 * base_width * 2 ** stage
            blocks = nn.Sequential()
            for i in range(count):
                blocks.add_module(f"block{i + 1}", Bottleneck(channels if i == 0 else width, width,
                                                              stride if i == 0 else 1, dilation, i == 0, stride_in_1x1))
            self.add_module(f"layer{stage + 2}", blocks)
            channels = width
        self.aspp = ASPP(channels, out_channels)


class MultiScale(nn.Module):
    """The same network on the image and on scaled copies of it, joined by the maximum over the scales per channel.

    forward(image (B, 3, H, W)): without scales base(image). With scales, in eval mode the maximum (B, D, h, w) at the
    grid of the full image; in training mode the list [full, one map per scale at its own grid, maximum].
    """

    def __init__(self, base: nn.Module, scales: Sequence[float] = ()):
        super().__init__()
        self.base = base
        self.scales = tuple(scales)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        full = self.base(image)
        if not self.scales:
            return full
        # By factor, not to a rounded size: for odd sizes the two sample other places.
        maps = [full, *(self.base(F.interpolate(image, scale_factor=scale, mode="bilinear")) for scale in self.scales)]
        highest = full
        for scaled in maps[1:]:
            highest = torch.maximum(highest, F.interpolate(scaled, full.shape[-2:], mode="bilinear"))
        return [*maps, highest] if self.training else highest


class DeepLabClassifier(nn.Module):
    """DeepLab v2 as an ordinary classifier: image (B, in_channels, H, W) -> logits (B, C, H, W), bilinear."""

    def __init__(self, num_classes: int, n_blocks: Sequence[int], base_width: int, in_channels: int = 3) -> None:
        super().__init__()
        self.network = MultiScale(DeepLabV2(num_classes, tuple(n_blocks), base_width, in_channels=in_channels))

    def forward(self, image: Tensor) -> Tensor:
        logits = self.network(image)                                                        # (B, C, H/8, W/8)
        return F.interpolate(logits.float(), image.shape[-2:], mode="bilinear")

    def scores(self, image: Tensor) -> Tensor:
        return self(image)


def freeze_batch_norm(module: nn.Module) -> None:
    """Put every batch norm of `module` into eval mode, so that its running statistics stay; call after every train().

    Whether its weight and bias have gradients is left alone.
    """
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


# -- weight files --------------------------------------------------------------

def read_deeplab_weights(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Somebody's ResNet or DeepLab -> (tensors by the names of DeepLabV2, plus those it has no place for; layout).

    Layouts: "torchvision" (ResNet-50, -101, -152) and "deeplab" (deeplab-pytorch, with or without base. or
    features.base., also inside a whole prototype network). Raises what read_weights raises; ValueError for a file that
    is neither, and for weights that are not finite.
    """
    content = read_weights(path)
    state = strip_prefixes({name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)})
    state = {name: tensor for name, tensor in state.items() if name.startswith("features.")} or state
    state = strip_prefixes(state, ("features.", "base."))
    if "layer1.0.conv1.weight" in state:
        state, layout = {_from_torchvision(name): tensor for name, tensor in state.items()}, "torchvision"
    elif "layer1.conv1.conv.weight" in state:
        layout = "deeplab"
    else:
        raise ValueError(f"{path}: neither torchvision's ResNet nor DeepLab v2, it holds "
                         f"{', '.join(map(str, list(content)[:5])) or 'nothing'}, ... Use, say, resnet101-63fe2227.pth")
    bad = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"{path}: {bad} is not finite. Use another file, or fetch this one again.")
    return state, layout


def _from_torchvision(name: str) -> str:
    """torchvision's name -> DeepLabV2's; a name of neither (fc.weight) stays."""
    parts = ("reduce", "conv3x3", "increase")
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"layer1.conv1.{match[1]}.{match[2]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)([123])\.(\w+)", name):
        return f"layer{int(match[1]) + 1}.block{int(match[2]) + 1}.{parts[int(match[4]) - 1]}.{match[3]}.{match[5]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.([01])\.(\w+)", name):
        layer = "conv" if match[3] == "0" else "bn"
        return f"layer{int(match[1]) + 1}.block{int(match[2]) + 1}.shortcut.{layer}.{match[4]}"
    return name


def load_deeplab_weights(model: MultiScale | DeepLabV2, path: str | Path) -> str:
    """Load a file of read_deeplab_weights: all of the backbone or, with a ValueError, nothing; ASPP where it fits.

    Returns one line: what matched, what of the file was dropped, and whether ASPP is the file's or random.
    """
    network = model.base if isinstance(model, MultiScale) else model
    state, layout = read_deeplab_weights(path)
    backbone = {name: tensor for name, tensor in state.items() if name.split(".")[0] in STAGES}
    first = "layer1.conv1.conv.weight"
    if first in backbone:                                   # other channels than red, green and blue
        backbone[first] = adapt_input(backbone[first], network.layer1.conv1.conv.in_channels)
    aspp = {name[len("aspp."):]: tensor for name, tensor in state.items() if name.startswith("aspp.")}
    dropped = [name for name in state if name not in backbone and not name.startswith("aspp.")]
    message = load_weights(nn.ModuleDict({stage: getattr(network, stage) for stage in STAGES}), backbone, path,
                           "backbone", layout)
    own = {name: tensor.shape for name, tensor in network.aspp.state_dict().items()}
    if {name: tensor.shape for name, tensor in aspp.items()} == own:
        network.aspp.load_state_dict(aspp)
        notes = [f"aspp {len(own)}/{len(own)}"]
    elif aspp:
        notes = [f"aspp starts from random values (the file's gives {next(iter(aspp.values())).shape[0]} channels, "
                 f"this model's {own['c0.weight'][0]})"]
    else:
        notes = ["aspp starts from random values"]
    if dropped:
        notes.insert(0, f"dropped {', '.join(dropped[:5])}" + (", ..." if len(dropped) > 5 else ""))
    return "; ".join([message, *notes])
