"""Labelled point clouds as batches of voxels: data sets for training and validation, precise test.

One cloud goes this way:
    read_cloud (points in file order) -> missing normals estimated, missing colours zero: `PointDataset.cloud`
    training:   augment, one random point a voxel, crop -> collate_points with Mix3D
    validation: one fixed point a voxel; `inverse` maps voxels back to raw points, `raw_label` is what counts
    test:       13 views x fragments, probabilities added up for every raw point: `PreciseTest`
A batch: coord (N, 3) float32, grid_coord (N, 3) int32, feat (N, C) float32, label (N,) int64 and offset (S,) int64, the
ends of the scenes. S scenes, N voxels, R raw points.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.label_map import LabelMap
from data.point_files import PointCloud, label_names, read_cloud
from data.point_formats import check_columns
from data.point_normals import (
    MOST_BELOW,
    NORMAL_NEIGHBORS,
    NORMAL_VIEWS,
    describe_view,
    estimate_normals,
    share_below,
)
from data.point_transforms import (
    MAX_GRID_INDEX,
    SHAPE_CHANNELS,
    VIEWS,
    Cloud,
    PointAugmentation,
    apply_view,
    bounds,
    center_shift,
    distinct,
    fragments,
    height_over_plane,
    largest_sides,
    local_shape,
    mix_offsets,
    noise_cell,
    representatives,
    stack_features,
    take,
    training_sample,
    voxelize,
)
from data.point_values import to_labels
from data.upright import UP, z_up
from utils.array_file import load_checked, save_checked
from utils.checks import check_choice, did_you_mean, nearest
from utils.files import remove_leftovers_once, replacing
from utils.fingerprint import digest, fingerprint
from utils.log import progress, shortened
from utils.losses import IGNORE_INDEX
from utils.seed import derived_seed

POINTS_IN_MEMORY = 30_000_000               # about 1.2 GB; clouds beyond this are read again for every item
FEW_VOXELS, CROWDED = 100, 50               # a cloud of fewer voxels, with more points in each, is in other units
WIDEST = 500.0                              # metres; a wider cloud is probably in millimetres or centimetres


# The last two are computed from the coordinates. Other features are fields of the files: intensity, intensity/65535.
FEATURES = ("coord", "color", "normal", "height", "shape")


@dataclass(frozen=True)
class PointSpec:
    """How clouds become voxels: the same in training and prediction, from the config in the checkpoint.

    Raises ValueError for unknown features or choices and for sizes that are not above 0.
    """

    grid_size: float = 0.02                             # metres, after `unit`
    unit: float = 1.0                                   # metres of one length unit of the files; 3 makes a cloud larger
    features: tuple[str, ...] = ("coord", "color", "normal")
    missing_normal: str = "estimate"                    # estimate | zeros | error
    missing_color: str = "zeros"                        # zeros | error
    test_grid_size: float | None = None                 # S3DIS: 0.01, one point a voxel of this size before the test
    scale: float | str = 1.0                            # what metres are multiplied by before voxels are made: Utonia
                                                        # 0.5 indoors, 0.2 outdoors, "object": each cloud to radius 1
    center: bool = True                                 # false, outdoors: the sensor stays at 0
    color_range: tuple[float, float] | None = None      # of the files: black and white; None: 0..1 or 0..255
    normal_view: str | tuple[float, float, float] | None = None     # of point_normals, a viewpoint in the files' units;
                                                        # None: inside, or where the ground would look down, neighbours
    shape_sizes: tuple[float, ...] = (0.02, 0.04, 0.08)  # of the feature "shape": metres after unit, before scale
    columns: tuple[str, ...] = ()                       # of files that do not name their columns
    up: str = "auto"                                    # auto | z | y: the files' up axis; auto is z: no format says

    def __post_init__(self) -> None:
        check_columns(self.columns)
        check_choice("data.up", self.up, UP)
        names = [_name_and_scale(feature)[0] for feature in self.features]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"data.features={list(self.features)}: expected one feature or more, each named once")
        check_choice("data.missing_normal", self.missing_normal, ("estimate", "zeros", "error"))
        check_choice("data.missing_color", self.missing_color, ("zeros", "error"))
        for name in ("grid_size", "unit", "test_grid_size"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"data.{name}={value}: expected a number above 0")
        if self.scale != "object" and (isinstance(self.scale, bool | str) or not 0 < self.scale < float("inf")):
            raise ValueError(f"data.scale={self.scale}: expected a number above 0, or object")
        if not self.shape_sizes or not all(size > 0 for size in self.shape_sizes):
            raise ValueError(f"data.shape_sizes={list(self.shape_sizes)}: expected lengths above 0")
        if (colors := self.color_range) is not None and not (len(colors) == 2 and colors[0] < colors[1]):
            raise ValueError(f"data.color_range={list(colors)}: expected the highest colour, or [lowest, highest]")
        if isinstance(self.normal_view, str):
            check_choice("data.normal_view", self.normal_view, NORMAL_VIEWS)
        elif self.normal_view is not None and len(self.normal_view) != 3:
            raise ValueError(f"data.normal_view={list(self.normal_view)}: expected {' | '.join(NORMAL_VIEWS)} or "
                             f"[x, y, z]")

    @property
    def num_channels(self) -> int:
        """Columns of `feat`: 3 each for coord, color and normal, 4 a size for shape, 1 for all others."""
        width = {**dict.fromkeys(FEATURES, 3), "height": 1, "shape": SHAPE_CHANNELS * len(self.shape_sizes)}
        return sum(width.get(name, 1) for name in self.features)

    @property
    def fields(self) -> dict[str, tuple[str, float]]:
        """{feature: (field of the files, what its numbers are divided by)} of the features that are such fields."""
        return {feature: _name_and_scale(feature) for feature in self.features if feature not in FEATURES}

    def read(self, path: str | Path, label_field: str | None = None, labels: bool = True) -> PointCloud:
        """read_cloud with all that the features need, and turned about x where y points up; `exact` then lies as the
        file does."""
        cloud = read_cloud(path, label_field, labels, self.color_range, self.columns,
                           [field for field, _ in self.fields.values()])
        if self.up != "y":
            return cloud
        return cloud._replace(coord=z_up(cloud.coord), normal=None if cloud.normal is None else z_up(cloud.normal),
                              exact=cloud.coord if cloud.exact is None else cloud.exact)


def _name_and_scale(feature: str) -> tuple[str, float]:
    """"intensity/65535" -> ("intensity", 65535.0)."""
    name, slash, divisor = feature.partition("/")
    try:
        divisor = float(divisor) if slash else 1.0
    except ValueError:
        divisor = 0.0
    near = [] if name in FEATURES else nearest(name, FEATURES)              # no field is called that
    if not name.isidentifier() or not 0 < divisor < float("inf") or (slash and name in FEATURES) or near:
        raise ValueError(f"data.features: {feature!r}: expected one of {', '.join(FEATURES)}, or a field of the files, "
                         f"such as intensity or intensity/65535{did_you_mean(near)}")
    return name, divisor


def spec_of(data: Mapping) -> PointSpec:
    """The spec of a section of the settings; keys that an old checkpoint lacks have their defaults. color_range may be
    one number, white. ValueErrors as for PointSpec."""
    values = {field.name: data[field.name] for field in fields(PointSpec) if field.name in data}
    if isinstance(values.get("color_range"), float):
        values["color_range"] = (0.0, values["color_range"])
    return PointSpec(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


# -- data sets ---------------------------------------------------------------------------------------------------------

def complete(cloud: PointCloud, spec: PointSpec, path: str | Path = "cloud",
             cache_dir: str | Path | None = None) -> tuple[PointCloud, tuple[str, ...]]:
    """Fill in missing colours and normals as the spec says, and height and shape where they are features (height in
    metres after unit); -> cloud, and what was missing, for a message.

    Estimated normals and shape, for which a length is a metre whatever the spec's scale, are kept in cache_dir. A cloud
    wider than 500 m, or as small as a few voxels, gets a warning. ValueError for one of more voxels along an axis than
    can be, and where the spec says "error".
    """
    sides = np.ptp(cloud.coord, 0) * spec.unit
    extent = sides.max()
    wide = f"{path}: the cloud is {extent:.0f} m wide; is it in millimetres? Set data.unit=0.001"
    largest = max(view.factor for view in VIEWS)            # of the precise test
    if spec.scale != "object" and extent * spec.scale * largest > MAX_GRID_INDEX * spec.grid_size:
        raise ValueError(f"{wide}, or a larger data.grid_size: {MAX_GRID_INDEX + 1} voxels of {spec.grid_size:g} m fit "
                         f"along an axis")
    if extent > WIDEST:
        cloud = cloud._replace(warnings=(*cloud.warnings, wide))
    voxels = 0 if spec.scale == "object" else np.prod(sides * spec.scale // spec.grid_size + 1)     # at most
    if 0 < voxels <= FEW_VOXELS and len(cloud.coord) > CROWDED * voxels:
        small = (f"{path}: {len(cloud.coord)} points, {extent:.3g} m wide, fill at most {voxels:.0f} voxels of "
                 f"{spec.grid_size:g} m; set data.unit or a smaller data.grid_size")
        cloud = cloud._replace(warnings=(*cloud.warnings, small))
    missing = [name for name in ("color", "normal") if name in spec.features and getattr(cloud, name) is None]
    for name in missing:
        way = spec.missing_color if name == "color" else spec.missing_normal
        if way == "error":
            raise ValueError(f"{path}: no {name}s; set data.missing_{name} or take {name} out of data.features")
        if way == "estimate":
            cloud = _with_normals(cloud, spec, cache_dir)
        else:
            cloud = cloud._replace(**{name: np.zeros_like(cloud.coord)})
    if "height" in spec.features:
        cloud = cloud._replace(height=height_over_plane(cloud.coord * np.float32(spec.unit)))
    if "shape" in spec.features:
        shape = partial(local_shape, sizes=spec.shape_sizes)
        settings = bytes([NORMAL_NEIGHBORS]) + np.float64(spec.shape_sizes).tobytes()
        width = SHAPE_CHANNELS * len(spec.shape_sizes)
        coord = cloud.coord * np.float32(spec.unit)
        cloud = cloud._replace(shape=_cached("shape", shape, coord, width, settings, cache_dir))
    return cloud, tuple(missing)


def _with_normals(cloud, spec, cache_dir):
    coord = cloud.coord * np.float32(spec.unit)
    view = spec.normal_view or "inside"
    if not isinstance(view, str):                           # where the cloud was moved, the viewpoint moves with it
        point = np.array([view], np.float64)
        first = (cloud.coord if cloud.exact is None else cloud.exact)[:1].astype(np.float64)
        if spec.up == "y":
            point, first = z_up(point), z_up(first)
        point = tuple(((point - (first - cloud.coord[:1])) * spec.unit)[0].tolist())
        return cloud._replace(normal=_cached_normals(coord, cache_dir, point), normal_view=view)
    normal = _cached_normals(coord, cache_dir, view)
    if spec.normal_view is None and share_below(coord, normal) > MOST_BELOW:
        view = "neighbours"
        normal = _cached_normals(coord, cache_dir, view)
    return cloud._replace(normal=normal, normal_view=view)


def _cached_normals(coord, cache_dir, view="inside"):
    settings = bytes([NORMAL_NEIGHBORS]) + (b"" if view == "inside" else repr(view).encode())
    return _cached("normals", partial(estimate_normals, view=view), coord, 3, settings, cache_dir)


def _cached(name, compute, coord, width, settings, cache_dir):
    """compute(coord), (N, width); kept in cache_dir (None: not at all) under a hash of coord and settings (bytes)."""
    if cache_dir is None:
        return compute(coord)
    key = hashlib.sha256(coord.tobytes() + settings).hexdigest()[:32]
    entry = Path(cache_dir) / f"{name}_{key}.npy"
    remove_leftovers_once(cache_dir)
    stored = load_checked(entry)
    if stored is not None and stored.shape == (len(coord), width):
        return np.array(stored)
    values = compute(coord)                                 # absent or damaged: computed, and written over
    entry.parent.mkdir(parents=True, exist_ok=True)
    with replacing(entry) as file:
        save_checked(file, values)
    return values


@dataclass
class PointDataset(Dataset):
    """Clouds with one label a point.

    files: clouds in a fixed order. num_classes None, or a cloud without labels: all IGNORE_INDEX. Item of a training
    set (augmentation given): a random sample of cloud item modulo len(files), with `mix_draw`, the batch's coin for
    Mix3D; an epoch has num_items items (None: each file once). Item of an evaluation set: one point of every voxel
    (always the same), `inverse` (R,) int64 from raw points to voxels and `raw_label` (R,) int64. label_map: which
    number in the files is which class.
    Randomness depends on (seed, epoch, item) alone: not on workers, batch size or what ran before.
    All clouds are read and checked at construction, so that wrong data is found before training; `notes` says what
    is doubtful. Raises ValueError where the labels are out of range or no point of the whole set is labelled.
    """

    files: Sequence[Path]
    spec: PointSpec
    num_classes: int | None = None
    augmentation: PointAugmentation | None = None
    label_field: str | None = None
    ignore_labels: Sequence[int | str] = (-1,)
    cache_dir: str | Path | None = None
    seed: int = 0
    num_items: int | None = None
    description: str = "reading clouds"
    label_offset: int = 0                   # added to the files' labels: -1 where they count from 1
    label_map: LabelMap | None = None

    def __post_init__(self) -> None:
        self.epoch = 0
        self.files = [Path(file) for file in self.files]
        self.num_points: list[int] = []
        self.class_counts = np.zeros(self.num_classes or 0, np.int64)
        self._kept: dict[int, PointCloud] = {}
        self._digests: list[int] = []
        missing: dict[str, list[Path]] = {"color": [], "normal": [], "label": []}
        warnings: list[str] = []
        views: list[str | None] = []
        sides: list[np.ndarray] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            read = progress(pool.map(self._read, self.files), self.description, len(self.files))
            for index, (cloud, lacking) in enumerate(read):
                warnings += cloud.warnings
                views.append(cloud.normal_view)
                if self.augmentation is not None:
                    sides.append(self._sides(cloud, self.files[index]))
                self.num_points.append(len(cloud.coord))
                self._digests.append(digest(cloud.label))
                for name in lacking:
                    missing[name].append(self.files[index])
                if self.num_classes:
                    counts = np.bincount(cloud.label[cloud.label >= 0], minlength=self.num_classes)
                    self.class_counts += counts
                    if not counts.any():
                        missing["label"].append(self.files[index])
                if sum(self.num_points) <= POINTS_IN_MEMORY:
                    self._kept[index] = cloud
        self.notes = _of_each_kind(warnings)
        for granularity, _ in self.augmentation.elastic if sides else ():
            cell = max(noise_cell(side, granularity) for side in sides)
            if cell > granularity and self.augmentation.elastic_probability:
                self.notes.append(f"augmentation.elastic: to fit in memory, noise of {granularity:g} m gets cells "
                                  f"of up to {cell:.2g} m in clouds as wide as these; augmentation.elastic=[] turns "
                                  f"it off")
        self._share_view(views)
        self._report(missing)

    def _sides(self, cloud, path):
        """(3,) the largest extent that augmentation can give a cloud. ValueError where it has more voxels along an axis
        than can be: now, not in the middle of a run."""
        low, high = bounds(cloud.coord)
        sides = np.full(3, 2.0) if self.spec.scale == "object" else (high - low) * self.spec.unit * self.spec.scale
        sides = largest_sides(sides, self.augmentation)
        if sides.max() > MAX_GRID_INDEX * self.spec.grid_size:
            cure = 1.02 * sides.max() / MAX_GRID_INDEX
            raise ValueError(f"{path}: augmentation can make the cloud {sides.max():.0f} m wide, more than "
                             f"{MAX_GRID_INDEX + 1} voxels of {self.spec.grid_size:g} m along an axis; set "
                             f"data.grid_size={cure:.3g} or larger, or cut the cloud into tiles")
        return sides

    def _share_view(self, views):
        """Estimated normals of all clouds are turned as those of most: a network should see them in one way only."""
        found = [view for view in views if view]
        if self.spec.normal_view is not None or not found:
            return
        most = max(NORMAL_VIEWS, key=found.count)
        if most == "neighbours" or len(set(found)) > 1:
            self.notes.append(f"data.normal_view={most}: seen from inside, more than {100 * MOST_BELOW:g} % of the "
                              f"ground looks down in {found.count('neighbours')} of {len(found)} clouds")
        self.spec = replace(self.spec, normal_view=most)
        for index, view in enumerate(views):
            if view not in (None, most) and index in self._kept:
                self._kept[index] = self._read(self.files[index])[0]

    def _report(self, missing):
        worse = "; expect worse results from weights that always had them, such as sonata.pth"
        ways = {"color": "black" + worse, "label": "nothing to learn or to score",
                "normal": "zero" + worse}
        if self.spec.missing_normal == "estimate":
            ways["normal"] = f"estimated from neighbours, {describe_view(self.spec.normal_view or 'inside')}"
        files = [path for path in self.files if not path.is_dir()]
        last = {path.with_suffix(""): path for path in files}
        if twins := [(path, last[path.with_suffix("")]) for path in files if last[path.with_suffix("")] != path]:
            self.notes.append(f"{len(twins)} of {len(self.files)} clouds have the name of another but for the "
                              f"suffix, such as {twins[0][0]} and {twins[0][1].name}: is one a copy?")
        for name, files in missing.items():
            if files:
                self.notes.append(f"{len(files)} of {len(self.files)} clouds have no {name}s ({ways[name]}), the "
                                  f"first is {files[0]}")
        if self.num_classes and not self.class_counts.any():
            raise ValueError(f"no labelled point in {len(self.files)} clouds, the first is {self.files[0]}; expected a "
                             f"field named {' or '.join(label_names(self.label_field))}")

    def _read(self, path):
        cloud = self.spec.read(path, self.label_field, bool(self.num_classes))
        label = np.full(len(cloud.coord), IGNORE_INDEX, np.int64)
        if self.num_classes and cloud.label is not None:
            label = to_labels(cloud.label, self.num_classes, self.ignore_labels, path, self.label_offset,
                              self.label_map)
        cloud, missing = complete(cloud._replace(label=label), self.spec, path, self.cache_dir)
        return cloud._replace(exact=None), missing

    def ignored_classes(self) -> list[int]:
        """Classes whose numbers in the files are all ignored: no point can have them."""
        known = self.num_classes if self.label_map is None else 0           # every class of a map has a number
        return [c for c in range(known or 0) if c - self.label_offset in self.ignore_labels]

    def fingerprint(self) -> dict:
        """Names, numbers of points and digests of the labels of the files, see utils.fingerprint."""
        return fingerprint(self.files, self.num_points, self._digests)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch; evaluation sets ignore it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_items or len(self.files)

    def cloud(self, index: int) -> Cloud:
        """coord, color and normal (as far as features), label of files[index]: all raw points, in metres x scale."""
        cloud = self._kept[index] if index in self._kept else self._read(self.files[index])[0]
        return to_cloud(cloud, self.spec)

    def __getitem__(self, item: int) -> dict:
        """coord, grid_coord, feat, label (see the module); inverse and raw_label or mix_draw."""
        index = item % len(self.files)
        cloud = self.cloud(index)
        if self.augmentation is None:
            return evaluation_sample(cloud, self.spec)
        rng = np.random.default_rng(derived_seed(self.seed, self.epoch, item))
        mix_draw = float(rng.random())
        try:
            sample = training_sample(cloud, self.spec.grid_size, self.augmentation, rng, self.spec.center)
        except ValueError as error:
            raise ValueError(f"{self.files[index]}: {error}") from None
        return {**to_tensors(sample, self.spec), "mix_draw": mix_draw}


def _of_each_kind(warnings):
    """The first five lines of each kind: those that begin alike behind the name of their file, but for numbers."""
    kinds: dict[str, list[str]] = {}
    for line in warnings:
        words = re.sub(r"[\d.]+", "0", line.partition(": ")[2]).split()
        kinds.setdefault(" ".join(words[:3]), []).append(line)
    lines = []
    for found in kinds.values():
        lines += shortened(found, 5)
    return lines


def to_cloud(cloud: PointCloud, spec: PointSpec) -> Cloud:
    """The arrays that the features need, in float32, coordinates in metres x scale; label where the cloud has it.

    Scale "object": the centre of mass at 0 and the farthest point at distance 1 (a cloud on one spot stays there)."""
    arrays = {"coord": cloud.coord * np.float32(spec.unit)}
    factor = 1.0 if spec.scale == "object" else spec.scale
    if spec.scale == "object":
        around = arrays["coord"] - arrays["coord"].mean(0, dtype=np.float64).astype(np.float32)
        radius = np.sqrt((around * around).sum(1).max())
        arrays["coord"] = around / radius if radius > 0 else around
        factor = 1 / radius if radius > 0 else 1.0
    elif spec.scale != 1:
        arrays["coord"] = arrays["coord"] * np.float32(spec.scale)
    arrays |= {name: getattr(cloud, name).astype(np.float32) for name in FEATURES[1:] if name in spec.features}
    arrays |= {feature: (cloud.extra[field] / np.float32(divisor)).astype(np.float32)[:, None]
               for feature, (field, divisor) in spec.fields.items()}
    if "height" in arrays:
        arrays["height"] = arrays["height"] * np.float32(factor)
    return arrays if cloud.label is None else {**arrays, "label": cloud.label}


def to_tensors(cloud: Cloud, spec: PointSpec) -> dict[str, torch.Tensor]:
    """coord, grid_coord, feat and, where there are any, label of a voxelised cloud."""
    arrays = {name: cloud[name] for name in ("coord", "grid_coord", "label") if name in cloud}
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in
            {**arrays, "feat": stack_features(cloud, spec.features)}.items()}


def placed(cloud: Cloud, spec: PointSpec, z: bool) -> Cloud:
    """center_shift, or the cloud as it is where the spec says that clouds keep their place."""
    return center_shift(cloud, z) if spec.center else cloud


def evaluation_sample(cloud: Cloud, spec: PointSpec) -> dict[str, torch.Tensor]:
    """A raw cloud as voxels, always the same: coord, grid_coord, feat, label, inverse (R,) and raw_label (R,)."""
    cloud = placed(cloud, spec, z=True)
    voxels = voxelize(cloud["coord"], spec.grid_size)
    sample = take(cloud, representatives(voxels, np.random.default_rng(0)))
    sample = placed({**sample, "grid_coord": voxels.grid_coord}, spec, z=False)
    rest = {"inverse": voxels.inverse} | ({"raw_label": cloud["label"]} if "label" in cloud else {})
    return {**to_tensors(sample, spec), **{name: torch.from_numpy(values) for name, values in rest.items()}}


def collate_points(samples: Sequence[dict], mix_probability: float = 0.0) -> dict[str, torch.Tensor]:
    """Join the voxels of items into a batch with offset (S,) int64. With the given probability (the first item's
    mix_draw decides) neighbouring scenes become one, Mix3D: mix_offsets."""
    batch = {name: torch.cat([sample[name] for sample in samples]) for name in ("coord", "grid_coord", "feat", "label")
             if name in samples[0]}
    offset = torch.tensor([len(sample["coord"]) for sample in samples]).cumsum(0)
    mixed = samples[0].get("mix_draw", 1.0) < mix_probability
    return {**batch, "offset": mix_offsets(offset) if mixed else offset}


# -- the precise test --------------------------------------------------------------------------------------------------

class PreciseTest:
    """Votes of all views and fragments of one raw cloud (Pointcept's precise evaluation).

        test = PreciseTest(dataset.cloud(i), spec, num_classes)
        for batch in test:
            test.add(batch, model(batch))           # logits (V, num_classes)
        pred = test.prediction()                    # (R,) int64, raw points

    A batch is one fragment: coord, grid_coord, feat, offset, and index (V,), the points it is made of. Every point is
    in at least one fragment of every view. Points that are equal in everything are one point. With spec.test_grid_size
    the cloud is first thinned to one point a voxel of that size, and the prediction mapped back.

    max_fragments: no more fragments a view than these. The points of a voxel beyond them pass through no fragment; each
    gets the votes of a point of its voxel, as `others` (K,) and the places `other_places` (K,) of those in index.
    """

    def __init__(self, cloud: Cloud, spec: PointSpec, num_classes: int, max_fragments: int | None = None) -> None:
        self.spec = spec
        self.max_fragments = max_fragments
        self.cloud = placed({name: values for name, values in cloud.items() if name != "label"}, spec, z=True)
        self.inverse = None
        if spec.test_grid_size is not None:
            voxels = voxelize(self.cloud["coord"], spec.test_grid_size)
            self.cloud = take(self.cloud, representatives(voxels, np.random.default_rng(0)))
            self.inverse = torch.from_numpy(voxels.inverse)
        else:
            index, inverse = distinct(self.cloud)
            if len(index) < len(inverse):
                self.cloud, self.inverse = take(self.cloud, index), torch.from_numpy(inverse)
        self.votes = torch.zeros(len(self.cloud["coord"]), num_classes)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for view in VIEWS:
            seen = apply_view(self.cloud, view)
            voxels = voxelize(seen["coord"], self.spec.grid_size)
            beyond, turn = self._beyond(voxels)
            for f, index in enumerate(fragments(voxels, self.max_fragments)):
                fragment = placed({**take(seen, index), "grid_coord": voxels.grid_coord}, self.spec, z=False)
                others = beyond[turn == f]
                yield {**to_tensors(fragment, self.spec), "offset": torch.tensor([len(index)]),
                       "index": torch.from_numpy(index), "others": torch.from_numpy(others),
                       "other_places": torch.from_numpy(voxels.inverse[others])}

    def _beyond(self, voxels):
        """Points that no fragment takes, and the fragment whose votes each gets."""
        if self.max_fragments is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        rank = np.empty(len(voxels.order), np.int64)                    # of a point in its voxel
        rank[voxels.order] = np.arange(len(rank)) - voxels.start[voxels.inverse[voxels.order]]
        beyond = np.flatnonzero(rank >= self.max_fragments)
        return beyond, rank[beyond] % self.max_fragments

    def count_passes(self) -> int:
        """How many batches there are: the points of the fullest voxel, or max_fragments, of every view."""
        fullest = [voxelize(apply_view(self.cloud, view)["coord"], self.spec.grid_size).count.max() for view in VIEWS]
        return int(sum(min(count, self.max_fragments or count) for count in fullest))

    def add(self, batch: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        """Add the class probabilities of a fragment to its points."""
        if self.votes.device != logits.device:
            self.votes = self.votes.to(logits.device)
        votes = logits.float().softmax(1)
        self.votes[batch["index"].to(logits.device)] += votes                       # no point twice in a fragment
        self.votes[batch["others"].to(logits.device)] += votes[batch["other_places"].to(logits.device)]

    def prediction(self) -> torch.Tensor:
        """(R,) int64 on the CPU: the class with the largest sum of probabilities, for every raw point."""
        pred = self.votes.argmax(1).cpu()
        return pred if self.inverse is None else pred[self.inverse]
