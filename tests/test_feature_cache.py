"""Cached features are exactly what the backbone gave, are found again, and are computed anew when anything they depend on changes."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.feature_cache import CachedTaps
from data.image_splits import split_pairs
from data.images import Augmentation, SegmentationDataset
from tests.test_image_splits import data_of
from tests.tiny_images import write_pictures


def open_set(folder, size=32, views="windows"):
    pairs = split_pairs(data_of(folder), "train")
    return SegmentationDataset(pairs, size, 3, Augmentation() if views == "crops" else None, views=views)


def embedder(dtype=torch.float32, calls=None):
    def embed(image):
        if calls is not None:
            calls.append(len(image))
        maps = image.float().unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2))
        return [(maps * (i + 1) / 7).to(dtype) for i in range(4)]
    return embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_those_of_the_backbone(tmp_path, dtype, workers):
    dataset = open_set(write_pictures(tmp_path / "data", 3, size=(40, 70)))
    assert len(dataset) > 3                                            # several windows a picture
    cached = CachedTaps(dataset, embedder(dtype), "key", tmp_path / "cache", batch_size=2)
    loader = DataLoader(cached, batch_size=2, num_workers=workers)
    done = 0
    for batch in loader:
        for b in range(len(batch["index"])):
            own = dataset[done]
            assert torch.equal(batch["image"][b], own["image"]) and torch.equal(batch["label"][b], own["label"])
            for tap, expected in zip(batch["taps"], embedder(dtype)(own["image"][None]), strict=True):
                assert tap.dtype == dtype and torch.equal(tap[b], expected[0])
            done += 1
    assert done == len(dataset)


def test_found_again_until_something_changes(tmp_path):
    folder, calls = write_pictures(tmp_path / "data", 3), []

    def was_stored(key="key", size=32):
        calls.clear()
        cached = CachedTaps(open_set(folder, size), embedder(calls=calls), key, tmp_path / "cache", batch_size=4)
        assert bool(calls) != cached.was_stored
        return cached.was_stored

    assert not was_stored() and was_stored()
    assert not was_stored(key="other weights") and not was_stored(size=48) and was_stored()
    for path in (tmp_path / "cache").iterdir():                        # cut short by a full disk
        path.write_bytes(path.read_bytes()[:200])
    assert not was_stored() and was_stored()
    write_pictures(tmp_path / "data", 3, first_seed=50)                # more pictures
    assert not was_stored()
    pairs = split_pairs(data_of(folder), "train")                     # the same masks, read in another way
    for zero in (True, False):
        dataset = SegmentationDataset(pairs, 32, 3 - zero, None, reduce_zero_label=zero, views="windows")
        cached = CachedTaps(dataset, embedder(), "key", tmp_path / "cache")
        assert cached.was_stored != zero and torch.equal(cached[0]["label"], dataset[0]["label"])
    (folder / "masks" / "picture_000.png").write_bytes((folder / "masks" / "picture_001.png").read_bytes())
    assert not was_stored()


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupted(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CachedTaps(open_set(write_pictures(tmp_path / "data", 2)), interrupted, "key", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_changing_views_are_refused(tmp_path):
    with pytest.raises(ValueError, match="never change"):
        CachedTaps(open_set(write_pictures(tmp_path / "data", 2), views="crops"), embedder(), "key", tmp_path / "cache")


def test_labels_survive_the_narrow_type(tmp_path):
    dataset = open_set(write_pictures(tmp_path / "data", 2))
    cached = CachedTaps(dataset, embedder(), "key", tmp_path / "cache")
    assert cached[0]["label"].dtype == torch.int64 and (np.unique(cached[0]["label"]) == np.unique(dataset[0]["label"])).all()
