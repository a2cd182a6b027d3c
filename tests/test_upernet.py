"""models/upernet.py: sizes, gradients, dropout, batch norm with one value per channel, both ways to the pyramid."""

import pytest
import torch
from torch import nn

from models.upernet import BatchNorm2d, FCNHead, FeaturePyramidNeck, UPerHead, UPerNetSegmenter, windows_mean


def segmenter(dropout=0.1):
    torch.manual_seed(0)
    return UPerNetSegmenter(FeaturePyramidNeck(8), UPerHead([8] * 4, 5, 16, dropout=dropout), FCNHead(8, 5, 12, dropout=dropout))


def inputs(batch_size=2, grid=(3, 5), patch=16):
    g = torch.Generator().manual_seed(1)
    image = torch.randn(batch_size, 3, grid[0] * patch, grid[1] * patch, generator=g)
    return image, [torch.randn(batch_size, 8, *grid, generator=g) for _ in range(4)]


@pytest.mark.parametrize("patch, grid", [(16, (3, 5)), (16, (4, 4)), (14, (16, 32)), (16, (1, 1))])
def test_sizes(patch, grid):
    model = segmenter().eval()
    image, taps = inputs(2, grid, patch)
    sizes = [tuple(x.shape[-2:]) for x in model.neck(taps)]
    assert sizes == [(4 * grid[0], 4 * grid[1]), (2 * grid[0], 2 * grid[1]), grid, (-(-grid[0] // 2), -(-grid[1] // 2))]
    outputs = model(image, taps)
    assert list(outputs) == ["logits"] and outputs["logits"].shape == (2, 5, *sizes[0])
    model.backbone = lambda image: [tap.bfloat16().float() for tap in taps]
    scores = model.scores(image)
    assert scores.shape == (2, 5, *image.shape[-2:]) and scores.dtype == torch.float32
    outputs = model.train()(image, taps)
    assert outputs["aux_logits"].shape == (2, 5, *grid)


def test_scores_are_the_resized_logits():
    model = segmenter().eval()
    image, taps = inputs()
    expected = nn.functional.interpolate(model(image, taps)["logits"], (48, 80), mode="bilinear", align_corners=False)
    model.backbone = lambda image: taps
    torch.testing.assert_close(model.scores(image), expected)


def test_gradient_reaches_every_parameter_and_tap():
    model, (image, taps) = segmenter(dropout=0.0), inputs()
    taps = [tap.requires_grad_() for tap in taps]
    outputs = model(image, taps)
    (outputs["logits"].square().sum() + outputs["aux_logits"].square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(tap.grad.abs().sum() > 0 for tap in taps)


def test_each_map_of_the_pyramid_comes_from_its_own_tap():
    neck, (_, taps) = segmenter().neck.eval(), inputs()
    before = neck(taps)
    for i in range(4):
        after = neck([tap + (j == i) for j, tap in enumerate(taps)])
        assert [not torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [j == i for j in range(4)]


def test_neck_that_needs_the_image():
    class Neck(nn.Module):
        def forward(self, image, taps):
            maps = FeaturePyramidNeck.forward(pyramid, taps)
            return {str(4 - i): maps[3 - i] + image.mean() for i in range(4)}            # not in the order of names

    pyramid = FeaturePyramidNeck(8).eval()
    image, taps = inputs()
    model = UPerNetSegmenter(Neck(), UPerHead([8] * 4, 5, 16), FCNHead(8, 5, 12)).eval()
    expected = model.decode_head([x + image.mean() for x in pyramid(taps)])
    torch.testing.assert_close(model(image, taps)["logits"], expected)


def test_dropout_only_in_training():
    model, (image, taps) = segmenter(dropout=0.5), inputs()
    first, second = (model(image, taps) for _ in range(2))
    assert not torch.equal(first["logits"], second["logits"]) and not torch.equal(first["aux_logits"], second["aux_logits"])
    model.eval()
    assert torch.equal(model(image, taps)["logits"], model(image, taps)["logits"])


# -- batch norm -----------------------------------------------------------------------------------------------------


def test_batch_of_one_trains():
    """The pool to 1x1 gives one value per channel: its norm uses its statistics as they are; the others learn theirs."""
    model, (image, taps) = segmenter(), inputs(batch_size=1)
    model(image, taps)["logits"].sum().backward()
    counts = {name: int(m.num_batches_tracked) for name, m in model.named_modules() if isinstance(m, BatchNorm2d)}
    single = "decode_head.psp_modules.0.1.batch_norm"
    assert [name for name, count in counts.items() if count == 0] == [single]
    assert model.get_submodule(single).running_mean.eq(0).all() and model.get_submodule(single).weight.grad is not None
    model(*inputs(batch_size=2))
    assert int(model.get_submodule(single).num_batches_tracked) == 1


def test_batch_norm_differs_in_nothing_else():
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    for x in (torch.randn(2, 3, 1, 1), torch.randn(1, 3, 2, 1), torch.randn(4, 3, 5, 5)):
        torch.testing.assert_close(ours(x), theirs(x))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    single = torch.randn(1, 3, 1, 1)
    expected = theirs.eval()(single)
    torch.testing.assert_close(ours(single), expected)
    torch.testing.assert_close(ours.eval()(single), expected)
    assert torch.equal(ours.running_var, theirs.running_var)
    with pytest.raises(ValueError, match="more than 1 value"):
        theirs.train()(single)


def test_convertible_to_synchronised_batch_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(segmenter())
    names = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(names) == 14 and all(isinstance(model.get_submodule(name), nn.SyncBatchNorm) for name in names)
    assert model.state_dict().keys() == segmenter().state_dict().keys()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 11), (16, 16), (5, 32)])
@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_the_windows_are_those_of_adaptive_pooling(size, side):
    """Under --deterministic on a GPU they replace it: equal but for the order of the sums."""
    maps = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    wanted = torch.nn.functional.adaptive_avg_pool2d(maps, side)
    found = windows_mean(maps, side)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)
    gradients = [torch.autograd.grad((out * weight).sum(), maps)[0] for out in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-14)
