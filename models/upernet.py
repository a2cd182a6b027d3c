"""UPerNet (Xiao et al. 2018) on four feature maps, and the pyramids that make four maps of a plain vision transformer.

Wiring and sizes as in mmsegmentation (Apache-2.0); names of parameters as in transformers. Every resize is bilinear
with align_corners=False.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that also trains on one value per channel (batch 1, pooled to 1x1), where torch raises.

    A single value has no variance: there the running statistics normalise and stay as they are. All else is the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """maps (B, C, h, w) bilinearly to (B, C, *size); as they are where they have that size, if it is a number (under
    torch.export it may be a symbol)."""
    known = all(isinstance(side, int) for side in (*maps.shape[-2:], *size))
    return maps if known and maps.shape[-2:] == tuple(size) else F.interpolate(maps, tuple(size), mode="bilinear")


def pool(maps: Tensor, side: int) -> Tensor:
    """nn.AdaptiveAvgPool2d(side) of maps (B, C, h, w): means of side x side windows that cover the map.

    Its gradient on CUDA has no fixed order, and PyTorch refuses it under --deterministic: there the windows are cut out
    one by one, which is the same but for the rounding of the sums. Nor has ONNX it for maps of any size (symbols in
    torch.export), for which it is two matrix products.
    """
    if not isinstance(maps.shape[-1], int):
        rows, columns = (window_weights(length, side).to(maps.dtype) for length in maps.shape[-2:])
        return rows @ maps @ columns.T
    if maps.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(maps, side)
    return windows_mean(maps, side)


def window_weights(length: int, side: int) -> Tensor:
    """(side, length) float32: the share of each cell in the mean over each window of `pool` along one axis."""
    window, cell = torch.arange(side)[:, None], torch.arange(length)
    inside = (cell >= window * length // side) & (cell < ((window + 1) * length + side - 1) // side)
    return inside / inside.sum(1, keepdim=True)


def windows_mean(maps: Tensor, side: int) -> Tensor:
    """Means over the windows [floor(i h / side), ceil((i + 1) h / side)) of the rows, likewise columns."""
    h, w = maps.shape[-2:]
    rows, columns = ([(i * length // side, -(-(i + 1) * length // side)) for i in range(side)] for length in (h, w))
    means = [maps[..., top:bottom, left:right].mean((-2, -1)) for top, bottom in rows for left, right in columns]
    return torch.stack(means, -1).unflatten(-1, (side, side))                            # (B, C, side, side)


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(self.conv(x)).relu_()


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """1x1 convolution to the logits, initialised as in mmsegmentation: normal with deviation 0.01, bias 0."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid over all four, one 3x3 convolution over their union.

    forward(features): four maps (B, C_i, h_i, w_i), fine to coarse, strides 4, 8, 16, 32 -> logits (B, K, h_0, w_0).
    dropout drops whole channels before the classifier. Following mmsegmentation the pyramid has hidden_dim channels
    throughout and ends in logits; Xiao et al. use 256 in the feature pyramid.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, hidden_dim: int = 512,
                 pool_scales: Sequence[int] = (1, 2, 3, 6), dropout: float = 0.1):
        super().__init__()
        *fine, coarse = in_channels
        # The pools of mmsegmentation hold index 0 of each pair: names need it.
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(coarse, hidden_dim, 1))
                                         for scale in pool_scales)
        self.bottleneck = ConvModule(coarse + len(pool_scales) * hidden_dim, hidden_dim, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(channels, hidden_dim, 1) for channels in fine)
        self.fpn_convs = nn.ModuleList(ConvModule(hidden_dim, hidden_dim, 3) for _ in fine)
        self.fpn_bottleneck = ConvModule(len(in_channels) * hidden_dim, hidden_dim, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(hidden_dim, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        coarse = features[-1]
        pooled = [resize(convs(pool(coarse, average.output_size)), coarse.shape[-2:])
                  for average, convs in self.psp_modules]
        maps = [lateral(feature) for lateral, feature in zip(self.lateral_convs, features[:-1], strict=True)]
        maps.append(self.bottleneck(torch.cat([coarse, *pooled], 1)))
        for i in range(len(maps) - 1, 0, -1):                                           # from coarse to fine
            maps[i - 1] = maps[i - 1] + resize(maps[i], maps[i - 1].shape[-2:])
        maps[:-1] = [conv(x) for conv, x in zip(self.fpn_convs, maps[:-1], strict=True)]
        size = maps[0].shape[-2:]
        fused = self.fpn_bottleneck(torch.cat([resize(x, size) for x in maps], 1))      # (B, hidden_dim, h_0, w_0)
        return self.classifier(self.dropout(fused))


class FCNHead(nn.Module):
    """Auxiliary head for training: 3x3 convolution and classifier on one of the maps, stride 16 by default.

    forward(features), a list of maps (B, C_i, h_i, w_i) -> logits (B, K, h, w) at the size of map `index`.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, index: int = 2, dropout: float = 0.1):
        super().__init__()
        self.index = index
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.dropout(self.convs(features[self.index])))


class FeaturePyramidNeck(nn.Module):
    """Four maps of one resolution -> maps of 4, 2, 1 and 1/2 times that resolution, as BEiT (Bao et al. 2022) does.

    forward(taps): four maps (B, C, h, w), each from another depth of the transformer, the earliest becomes the finest
    -> (B, C, 4h, 4w), (B, C, 2h, 2w), (B, C, h, w), (B, C, ceil(h / 2), ceil(w / 2)). Of patches of 16 pixels that
    makes strides 4, 8, 16, 32; of 14 pixels 3.5, 7, 14, 28. Odd sizes keep their last row: the pooling rounds up.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.up4 = nn.Sequential(nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2), BatchNorm2d(embed_dim), nn.GELU(),
                                 nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2))
        self.up2 = nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2)
        self.down2 = nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = taps
        return [self.up4(first), self.up2(second), third, self.down2(fourth)]


class UPerNetSegmenter(nn.Module):
    """The trained part of UPerNet on a frozen backbone: a neck that makes the pyramid, the head, and an auxiliary head.

    neck: a DINOv3_Adapter, called with (image, taps), or a FeaturePyramidNeck, called with (taps); then only the size
    of the image matters. image (B, 3, H, W) normalised, taps four maps (B, C, h, w) of the backbone.
    forward -> {"logits" (B, K, ., .), in training also "aux_logits" (B, K, ., .)} at the sizes of their maps. backbone:
    set it to the FrozenBackbone for `scores`; it is no module, so it is in no state_dict.
    """

    backbone = None

    def __init__(self, neck: nn.Module, decode_head: UPerHead, auxiliary_head: FCNHead):
        super().__init__()
        self.neck, self.decode_head, self.auxiliary_head = neck, decode_head, auxiliary_head

    def forward(self, image: Tensor, taps: Sequence[Tensor]) -> dict[str, Tensor]:
        if isinstance(self.neck, FeaturePyramidNeck):
            features = self.neck(taps)
        else:
            maps = self.neck(image, taps)
            features = [maps[name] for name in ("1", "2", "3", "4")]
        outputs = {"logits": self.decode_head(features)}
        if self.training:
            outputs["aux_logits"] = self.auxiliary_head(features)
        return outputs

    def scores(self, image: Tensor) -> Tensor:
        """Logits at the size of the image: (B, K, H, W) float32."""
        return resize(self(image, self.backbone(image))["logits"].float(), image.shape[-2:])
