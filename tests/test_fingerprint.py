"""utils/fingerprint.py: the line that names what changed; and what each kind of data set knows of its files."""

import numpy as np
import pytest
from PIL import Image

from data.image_splits import checked_dataset, pair_files
from data.images import list_images
from data.mesh import MeshDataset, MeshSpec
from data.mesh_io import list_meshes
from data.mesh_surfaces import SurfaceSpec, open_meshes
from data.point_files import list_clouds
from data.points import PointDataset, PointSpec
from tests.tiny_clouds import write_clouds
from tests.tiny_images import write_pictures
from tests.tiny_meshes import write_set
from utils.fingerprint import changes, digest, fingerprint


def printed(*files, size=1, label=1):
    return fingerprint(files, [size] * len(files), [label] * len(files))


@pytest.mark.parametrize("before, now, line", [
    (printed("x/a", "x/b"), printed("y/a", "y/b"), None),                # the folder has moved
    (printed("a", "b"), printed("a", "c"), "train: b is gone, c is new"),
    (printed("a"), printed("a", "b", "c", "d", "e"), "train: b, c, d and 1 more is new"),
    (printed("a", "b"), printed("b", "a"), "train: the same files in another order"),
    (printed("a", "b"), fingerprint(["a", "b"], [1, 2], [1, 1]), "train: b (size) changed"),
    (printed("a", "b"), fingerprint(["a", "b"], [1, 2], [7, 7]), "train: a (labels), b (size and labels) changed"),
    (printed("a\nb"), printed("a", "b"), "train: a\nb is gone, a, b is new"), (printed(), printed(), None)])
def test_the_line_names_what_changed(before, now, line):
    assert changes({"train": before}, {"train": now, "val": printed("new")}) == line
    assert changes({}, {"train": now}) is None                          # a checkpoint of an earlier version


def test_several_data_sets():
    line = changes({"train": printed("a"), "val": printed("b"), "push": printed("c")}, {"train": printed("a"), "val": printed("d"), "push": printed()})
    assert line == "val: b is gone, d is new; push: c is gone"


def test_digest():
    a = np.arange(6, dtype=np.int64)
    assert digest(a) == digest(a.copy()) != digest(a[::-1]) and digest(a) != digest(a.astype(np.int32)) and digest(a[:3], a[3:]) == digest(a[:3], a[3:])


def pictures(folder, cache):
    settings = {"num_classes": 3, "ignore_label": 255, "reduce_zero_label": False, "cache_dir": cache, "image_size": 64}
    return checked_dataset(settings, pair_files(list_images(folder / "images"), list_images(folder / "masks")))[0]


def meshes(folder, cache):
    return MeshDataset(list_meshes(folder), folder, MeshSpec(("normal",)), 3, cache_dir=cache)


def surfaces(folder, cache):
    return open_meshes(list_meshes(folder), folder, SurfaceSpec(num_eigenpairs=4), None, num_classes=3, cache_dir=cache)


def clouds(folder, cache):
    return PointDataset(list_clouds(folder), PointSpec(0.05), 3, cache_dir=cache)


def edit_mask(folder):
    path = folder / "masks" / "picture_001.png"
    label = np.array(Image.open(path))
    places = [(label == c).argmax() for c in (0, 1)]
    label.flat[places] = [1, 0]                                        # as many pixels of each class as before
    Image.fromarray(label).save(path)


def edit_faces(folder):
    path = folder / "mesh_01.txt"
    lines = path.read_text().splitlines()
    lines[0] = "2" if lines[0] != "2" else "1"
    path.write_text("\n".join(lines) + "\n")


def edit_points(folder):
    path = sorted(folder.iterdir())[1]
    with np.load(path) as file:
        arrays = dict(file)
    arrays["segment"][0] = (arrays["segment"][0] + 1) % 3
    np.savez(path, **arrays)


KINDS = {"pictures": (write_pictures, pictures, edit_mask), "meshes": (write_set, meshes, edit_faces), "surfaces": (write_set, surfaces, edit_faces),
         "clouds": (write_clouds, clouds, edit_points)}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_set_sees_one_edited_label(tmp_path, kind, cached):
    write, read, edit = KINDS[kind]
    folder, cache = tmp_path / "data", tmp_path / "cache" if cached else None
    write(folder, 3)
    before = {"train": read(folder, cache).fingerprint()}
    assert changes(before, {"train": read(folder, cache).fingerprint()}) is None
    edit(folder)
    line = changes(before, {"train": read(folder, cache).fingerprint()})
    assert line is not None and "(labels) changed" in line and "1" in line.split("(")[0] and "," not in line
