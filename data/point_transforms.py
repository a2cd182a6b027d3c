"""Point clouds, from raw points to voxels: augmentation, grid sampling, cropping, mixing, views of the precise test.

A cloud is a dict of arrays with one row a point: coord (N, 3) float32 metres with z up, color (N, 3) float32 in 0..255,
normal (N, 3) float32 of length 1, label (N,) int64, height (N, 1) and shape (N, 4 S) float32, and whatever else must
stay in step. Functions return a new dict and leave the given one alone; all that is random takes a numpy Generator.
Recipe: Sonata (Wu et al. 2025) as released in Pointcept (MIT), with the exceptions named below; Mix3D: Nekrasov et al.
2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter1d
from scipy.spatial import cKDTree

from data.point_normals import NORMAL_NEIGHBORS, estimate_normals
from utils.checks import check_range

Cloud = dict[str, np.ndarray]

MAX_GRID_INDEX = 65534                  # the serialisation takes 16 bits an axis
MAX_NOISE_CELLS = 50_000_000            # of an elastic distortion: 600 MB; a wider cloud gets larger cells,
COARSE_NOISE_CELLS = 2_000_000          # no more than these
FNV_OFFSET, FNV_PRIME, SIGN_BIT = np.uint64(14695981039346656037), np.uint64(1099511628211), np.uint64(1 << 63)
SHAPE_CHANNELS = 4                      # numbers of local_shape for each of its sizes
LAYER = 0.01                            # metres: height_over_plane looks for the fullest layer of this thickness


def take(cloud: Cloud, index: np.ndarray) -> Cloud:
    """The rows `index` of every array."""
    return {name: values.take(index, 0) for name, values in cloud.items()}


def bounds(coord: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest of each column; NumPy's own way along the long axis takes ten times as long."""
    columns = np.ascontiguousarray(coord.T)
    return columns.min(1), columns.max(1)


# -- geometry ----------------------------------------------------------------------------------------------------------

def center_shift(cloud: Cloud, z: bool) -> Cloud:
    """The middle of the bounding box to x = y = 0 and, with z, the lowest point to z = 0."""
    low, high = bounds(cloud["coord"])
    shift = (low + high) / 2
    shift[2] = low[2] if z else 0
    return {**cloud, "coord": cloud["coord"] - shift}


def rotate(cloud: Cloud, degrees: float, axis: str = "z", center: Sequence[float] | None = None) -> Cloud:
    """Turn counter-clockwise about a line along `axis` through `center` (None: the middle of the bounding box); normals
    turn too. Computed in float64, so that quarter turns move nothing across a voxel border that they need not."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = cosine
    matrix[first, second], matrix[second, first] = -sine, sine
    coord = cloud["coord"].astype(np.float64)
    center = sum(bounds(coord)) / 2 if center is None else np.asarray(center, np.float64)
    turned = {**cloud, "coord": ((coord - center) @ matrix.T + center).astype(np.float32)}
    if "normal" in cloud:
        turned["normal"] = (cloud["normal"] @ matrix.T).astype(np.float32)
    return turned


def scale(cloud: Cloud, factor: float) -> Cloud:
    """Coordinates, and heights over the plane where the cloud has them, times `factor`."""
    return {name: values * np.float32(factor) if name in ("coord", "height") else values
            for name, values in cloud.items()}


def stretch(cloud: Cloud, factors: Sequence[float]) -> Cloud:
    """x, y and z times a factor each (above 0), heights over the plane times that of z; normals stay upright on their
    surface. The feature shape stays that of the cloud as it was."""
    factors = np.asarray(factors, np.float32)
    stretched = {**cloud, "coord": cloud["coord"] * factors}
    if "height" in cloud:
        stretched["height"] = cloud["height"] * factors[2]
    if "normal" in cloud:
        normal = cloud["normal"] / factors
        stretched["normal"] = normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-12)
    return stretched


def flip(cloud: Cloud, x: bool, y: bool) -> Cloud:
    """Mirror x, y or both, normals too."""
    sign = np.array([-1 if x else 1, -1 if y else 1, 1], np.float32)
    return {name: values * sign if name in ("coord", "normal") else values for name, values in cloud.items()}


def jitter(cloud: Cloud, sigma: float, clip: float, rng: np.random.Generator) -> Cloud:
    """Normal noise of `sigma` metres on every coordinate, cut at +-clip."""
    noise = rng.standard_normal(cloud["coord"].shape, np.float32) * np.float32(sigma)
    return {**cloud, "coord": cloud["coord"] + noise.clip(-clip, clip)}


def elastic_distortion(cloud: Cloud, granularity: float, magnitude: float, rng: np.random.Generator) -> Cloud:
    """Move points by a smooth random field (Simard et al. 2003, in 3D): normal noise on a grid of cells `granularity`
    wide (noise_cell says how much wider in large clouds), blurred twice by a box of three cells, read trilinearly,
    times `magnitude` metres. Normals stay as they are.
    """
    coord = cloud["coord"]
    low, high = bounds(coord)
    granularity = noise_cell(high - low, granularity)
    size = _noise_cells(high - low, granularity)
    noise = rng.standard_normal((*size, 3), np.float32)                             # (X, Y, Z, 3)
    for axis in (0, 1, 2) * 2:
        noise = uniform_filter1d(noise, 3, axis, mode="constant")
    place = ((coord - low) / granularity + 1) * (2 / (size - 1)) - 1                # (N, 3) in -1..1; a cell below low
    place = torch.from_numpy(place[:, ::-1].astype(np.float32)).view(1, 1, 1, -1, 3)
    field = torch.from_numpy(noise).permute(3, 0, 1, 2)[None]                       # (1, 3, X, Y, Z)
    moved = F.grid_sample(field, place, align_corners=True)[0, :, 0, 0].T.numpy()   # (N, 3)
    return {**cloud, "coord": coord + np.float32(magnitude) * moved}


def _noise_cells(sides, granularity):
    return np.array([int(side // granularity) + 3 for side in sides])


def noise_cell(sides: Sequence[float], granularity: float) -> float:
    """The cells' width in an elastic distortion of a cloud with these sides: granularity, or as much more as its grid
    needs to fit in memory."""
    if math.prod(_noise_cells(sides, granularity).tolist()) > MAX_NOISE_CELLS:
        while math.prod(_noise_cells(sides, granularity).tolist()) > COARSE_NOISE_CELLS:
            granularity *= 1.1
    return granularity


# -- colour ------------------------------------------------------------------------------------------------------------

def auto_contrast(cloud: Cloud, blend: float) -> Cloud:
    """Blend with the colours stretched to 0..255, channel by channel; a channel of one value stays."""
    color = cloud["color"]
    low, high = bounds(color)
    stretch = np.where(high > low, 255 / np.maximum(high - low, 1e-6), 1)
    factor, shift = 1 - blend + blend * stretch, np.where(high > low, blend * low * stretch, 0)
    return {**cloud, "color": color * factor.astype(np.float32) - shift.astype(np.float32)}


def color_translation(cloud: Cloud, ratio: float, rng: np.random.Generator) -> Cloud:
    """Add one value in +-255 ratio to each channel, cut at 0 and 255."""
    shift = (rng.random((1, 3)) - 0.5) * 255 * 2 * ratio
    return {**cloud, "color": np.clip(cloud["color"] + shift.astype(np.float32), 0, 255)}


def color_jitter(cloud: Cloud, std: float, rng: np.random.Generator) -> Cloud:
    """Normal noise of 255 std on every value, cut at 0 and 255."""
    noise = rng.standard_normal(cloud["color"].shape, np.float32) * np.float32(255 * std)
    return {**cloud, "color": np.clip(cloud["color"] + noise, 0, 255)}


# -- points to voxels --------------------------------------------------------------------------------------------------

class Voxels(NamedTuple):
    """grid_coord (V, 3) int32 >= 0; order (N,) int64: the points sorted by voxel, in a voxel by index; start and count
    (V,) int64: where a voxel's points stand in `order`; inverse (N,) int64: the voxel of every point."""

    grid_coord: np.ndarray
    order: np.ndarray
    start: np.ndarray
    count: np.ndarray
    inverse: np.ndarray


def voxelize(coord: np.ndarray, grid_size: float) -> Voxels:
    """Cells of `grid_size` metres, smallest index 0 on each axis, in the official order: by the 64-bit FNV hash of the
    cell (which scatters neighbours). Cells are told apart by themselves, not by their hash: no two are ever merged.

    Raises ValueError for a cloud of more than 65,535 cells along an axis.
    """
    grid = np.floor(coord.astype(np.float64) / grid_size).T.astype(np.int64)        # (3, N)
    grid -= grid.min(1, keepdims=True)
    if grid.max() > MAX_GRID_INDEX:
        raise ValueError(f"a cloud {np.ptp(coord, 0).max():.6g} m wide has {grid.max() + 1} voxels of {grid_size:g} m "
                         f"along an axis, at most {MAX_GRID_INDEX + 1} can be: are the coordinates in millimetres? Set "
                         f"data.unit or a larger data.grid_size")
    key, order = _sort(grid[0] << 32 | grid[1] << 16 | grid[2])
    start = np.flatnonzero(np.diff(key, prepend=-1))
    count = np.diff(start, append=len(key))
    cells = grid[:, order[start]]                                                   # (3, V)
    hashed = np.full(cells.shape[1], FNV_OFFSET)
    for axis in cells:
        hashed = hashed * FNV_PRIME ^ axis.astype(np.uint64)
    _, rank = _sort((hashed ^ SIGN_BIT).view(np.int64))                             # unsigned order
    position = np.empty_like(rank)
    position[rank] = np.arange(len(rank))
    inverse = np.empty_like(order)
    inverse[order] = np.repeat(position, count)
    return Voxels(np.ascontiguousarray(cells[:, rank].T.astype(np.int32)), order, start[rank], count[rank], inverse)


def _sort(key):
    """Sorted int64 and their stable order; torch's sort is three times as fast as NumPy's."""
    values, order = torch.from_numpy(key).sort(stable=True)
    return values.numpy(), order.numpy()


def representatives(voxels: Voxels, rng: np.random.Generator) -> np.ndarray:
    """(V,) one point of each voxel, all equally likely (officially a draw modulo the count: almost equally)."""
    return voxels.order[voxels.start + rng.integers(0, voxels.count)]


def fragments(voxels: Voxels, most: int | None = None) -> Iterator[np.ndarray]:
    """F times (V,) points, F the largest count: fragment f takes point f modulo count of every voxel, so that every
    point occurs and every fragment fills all voxels. One at a time: of a dense scan there are thousands. most: no more
    fragments than these, of the first points of every voxel."""
    count = voxels.count if most is None else np.minimum(voxels.count, most)
    for turn in range(count.max(initial=0)):
        yield voxels.order[voxels.start + turn % count]


def distinct(cloud: Cloud) -> tuple[np.ndarray, np.ndarray]:
    """Points equal in all arrays, bit by bit, as one: index (K,) of the first of each, ascending, and inverse (N,), the
    place of every point in it."""
    everything = np.arange(len(cloud["coord"]))
    columns = np.concatenate([values.astype(np.float32) for values in cloud.values()], 1).view(np.uint32)
    hashed = np.full(len(columns), FNV_OFFSET)
    for column in columns.T:
        hashed = hashed * FNV_PRIME ^ column
    _, index, inverse = np.unique(hashed, return_index=True, return_inverse=True)
    if len(index) == len(columns) or (columns[index[inverse]] != columns).any():        # two points, one hash
        return everything, everything
    rank = np.empty_like(index)
    rank[index.argsort()] = np.arange(len(index))
    return np.sort(index), rank[inverse]


def sphere_crop(cloud: Cloud, num_points: int, center: np.ndarray) -> Cloud:
    """The num_points points nearest to `center`, nearest first; a cloud with no more than that stays as it is."""
    if len(cloud["coord"]) <= num_points:
        return dict(cloud)
    away = cloud["coord"] - center
    distance = np.einsum("nc,nc->n", away, away)
    nearest = np.argpartition(distance, num_points - 1)[:num_points]
    nearest.sort()                                                                  # equal distances by index
    return take(cloud, nearest[distance[nearest].argsort(kind="stable")])


def stack_features(cloud: Cloud, names: Sequence[str]) -> np.ndarray:
    """(N, C) float32 of the arrays `names` side by side; colours in 0..1, height in tenths of a metre: a network reads
    the columns as they are, and should not have to enlarge any."""
    columns = []
    for name in names:
        if name == "color":
            columns.append(cloud[name] / np.float32(255))
        elif name == "height":
            columns.append(cloud[name] * np.float32(10))
        else:
            columns.append(cloud[name])
    return np.concatenate(columns, 1).astype(np.float32)


def mix_offsets(offset: torch.Tensor) -> torch.Tensor:
    """Mix3D on the ends (S,) of the scenes of a batch: scenes 0 + 1, 2 + 3, ... become one, an odd last one stays.

    Grid coordinates stay as they are (as officially): a mixed scene may hold two points of one voxel.
    """
    return torch.cat([offset[1:-1:2], offset[-1:]])


def height_over_plane(coord: np.ndarray, layer: float = LAYER) -> np.ndarray:
    """(N, 1) float32 metres over the plane that most points lie on (table, floor), which must be level: the median of
    z in the fullest of all layers `layer` thick and the two beside it. Below it negative."""
    z = coord[:, 2].astype(np.float64)
    cell = np.floor((z - z.min()) / layer).astype(np.int64)
    cells, count = np.unique(cell, return_counts=True)
    beside = np.abs(cell - cells[count.argmax()]) <= 1
    return (z - np.median(z[beside])).astype(np.float32)[:, None]


def local_shape(coord: np.ndarray, sizes: Sequence[float]) -> np.ndarray:
    """(N, 4 S) float32, how the surface around each point bends, in neighbourhoods of S sizes (metres): invariant to
    turns about z, roughly in 0..1.

    For a size the points are first averaged in cells that wide; a neighbourhood is the 16 cells nearest to a point, so
    that it grows with the size (about 4 cells wide). Four numbers each: `thickness`, three times the root of the
    smallest eigenvalue's share in the positions' covariance (Pauly et al. 2002; 0 on a plane, 1.7 where all directions
    are alike); `bend`, how far the neighbours' mean lies behind the point along its normal, in standard deviations
    of the neighbourhood times 3 (convex above 0, hollow below); the two largest standard deviations of the neighbours'
    normals (0, 0 on a plane; one on a cylinder or an edge; both on a ball or a corner). Neighbourhoods of fewer than
    four cells: zeros.
    """
    coord = coord.astype(np.float64)
    return np.concatenate([_shape_at(coord, size) for size in sizes], 1).astype(np.float32)


def _shape_at(coord, size):
    voxels = voxelize(coord, size)
    means = np.stack([np.bincount(voxels.inverse, axis) for axis in coord.T], 1) / voxels.count[:, None]
    shape = np.zeros((len(coord), SHAPE_CHANNELS))
    if len(means) < 4:
        return shape
    normal = estimate_normals(means).astype(np.float64)
    _, index = cKDTree(means).query(coord, min(NORMAL_NEIGHBORS, len(means)))       # (N, k)
    for begin in range(0, len(coord), 1 << 16):                                     # bounded memory
        rows = slice(begin, begin + (1 << 16))
        around, turned = means[index[rows]], normal[index[rows]]                    # (n, k, 3)
        middle = around.mean(1)
        around -= middle[:, None]
        spread, axes = np.linalg.eigh(around.swapaxes(1, 2) @ around / around.shape[1])
        total = spread.sum(1).clip(1e-12)
        facing = axes[:, :, 0]
        facing *= np.where((facing * turned[:, 0]).sum(1) < 0, -1, 1)[:, None]
        turned *= np.where(turned @ facing[:, :, None] < 0, -1, 1)                 # whichever side each was turned to
        turned -= turned.mean(1, keepdims=True)
        bundle = np.linalg.eigvalsh(turned.swapaxes(1, 2) @ turned / turned.shape[1])
        shape[rows, 0] = 3 * np.sqrt(spread[:, 0].clip(0) / total)
        shape[rows, 1] = 3 * ((coord[rows] - middle) * facing).sum(1) / np.sqrt(total)
        shape[rows, 2:] = np.sqrt(bundle[:, :0:-1].clip(0))
    return shape


# -- the training recipe -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PointAugmentation:
    """Random changes of a training cloud. The defaults are those of Sonata on ScanNet; S3DIS: crop_share 0.6 and
    crop_points 204,800. Lengths in metres after data.unit and data.scale. Raises ValueError for shares outside [0, 1],
    negative amounts and ranges that are not [lowest, highest]."""

    dropout: float = 0.2                            # share of the points that is left out, every time
    rotation_z: float = 180.0                       # largest turn about the origin, degrees
    rotation_xy: float = 180 / 64                   # about the middle of the cloud
    rotation_probability: float = 0.5               # of each of the three turns
    scale_range: tuple[float, float] = (0.9, 1.1)
    stretch: float = 0.0                            # each axis, after the turns, times 1 -+ this at most
    flip_probability: float = 0.5                   # of x and of y
    jitter: float = 0.005
    jitter_clip: float = 0.02
    elastic: tuple[tuple[float, float], ...] = ((0.2, 0.4), (0.8, 1.6))     # granularity and magnitude of each pass
    elastic_probability: float = 0.95
    contrast_probability: float = 0.2
    color_shift: float = 0.05
    color_shift_probability: float = 0.95
    color_jitter: float = 0.05
    color_jitter_probability: float = 0.95
    drop_color: float = 0.0                         # probability that an item has no colours at all (zeros), so that
    drop_normal: float = 0.0                        # a network learns to do without; the same for normals
    crop_share: float | None = None                 # of the voxels that a first crop keeps
    crop_points: int | None = 102_400               # most voxels of an item
    mix_probability: float = 0.8                    # Mix3D, once a batch

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            share = name.startswith("drop") or name.endswith(("_probability", "_share"))
            if isinstance(value, (int, float)):
                check_range(f"augmentation.{name}", value, 0, 1 if share else math.inf)
        if self.dropout >= 1 or self.crop_share == 0 or self.crop_points == 0:
            raise ValueError(f"augmentation: dropout={self.dropout:g}, crop_share={self.crop_share}, "
                             f"crop_points={self.crop_points} would leave no point")
        if self.stretch >= 1:
            raise ValueError(f"augmentation.stretch={self.stretch:g}: expected a number below 1")
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"augmentation.scale_range={list(self.scale_range)}: expected [lowest, highest], "
                             f"both above 0")
        if any(len(step) != 2 or not step[0] > 0 for step in self.elastic):
            raise ValueError(f"augmentation.elastic={[list(step) for step in self.elastic]}: expected pairs "
                             f"[granularity, magnitude], granularity above 0")


def augment(cloud: Cloud, settings: PointAugmentation, rng: np.random.Generator) -> Cloud:
    """The random changes before voxelisation, in the official order. The cloud must have been centred (center_shift
    with z)."""
    if settings.dropout:
        keep = max(1, int(len(cloud["coord"]) * (1 - settings.dropout)))
        cloud = take(cloud, rng.permutation(len(cloud["coord"]))[:keep])
    for axis, most in (("z", settings.rotation_z), ("x", settings.rotation_xy), ("y", settings.rotation_xy)):
        if rng.random() < settings.rotation_probability:
            cloud = rotate(cloud, rng.uniform(-most, most), axis, (0, 0, 0) if axis == "z" else None)
    cloud = scale(cloud, rng.uniform(*settings.scale_range))
    if settings.stretch:                                                            # 0 draws nothing, as before it
        cloud = stretch(cloud, rng.uniform(1 - settings.stretch, 1 + settings.stretch, 3))
    cloud = flip(cloud, *(rng.random(2) < settings.flip_probability))
    if settings.jitter:
        cloud = jitter(cloud, settings.jitter, settings.jitter_clip, rng)
    if settings.elastic and rng.random() < settings.elastic_probability:
        for granularity, magnitude in settings.elastic:
            cloud = elastic_distortion(cloud, granularity, magnitude, rng)
    if "color" in cloud:
        if rng.random() < settings.contrast_probability:
            cloud = auto_contrast(cloud, rng.random())
        if rng.random() < settings.color_shift_probability:
            cloud = color_translation(cloud, settings.color_shift, rng)
        if rng.random() < settings.color_jitter_probability:
            cloud = color_jitter(cloud, settings.color_jitter, rng)
    for name, probability in (("color", settings.drop_color), ("normal", settings.drop_normal)):
        if name in cloud and probability and rng.random() < probability:        # 0 draws nothing: runs stay as they are
            cloud = {**cloud, name: np.zeros_like(cloud[name])}
    return cloud


def largest_sides(sides: Sequence[float], settings: PointAugmentation) -> np.ndarray:
    """(3,) metres: how wide `augment` can make a cloud with these sides, x and y alike, noise at its usual size."""
    x, y, z = map(float, sides)
    turns = settings.rotation_probability > 0
    flat = math.hypot(x, y) if turns and settings.rotation_z else max(x, y)
    tilt = math.sin(math.radians(min(settings.rotation_xy, 90))) if turns else 0.0
    high = z + 2 * tilt * flat
    noise = settings.jitter_clip if settings.jitter else 0.0
    if settings.elastic_probability:
        noise += sum(magnitude for _, magnitude in settings.elastic)
    grown = settings.scale_range[1] * (1 + settings.stretch)
    return np.array([flat + tilt * high, flat + tilt * high, high]) * grown + 2 * noise


def training_sample(cloud: Cloud, grid_size: float, settings: PointAugmentation, rng: np.random.Generator,
                    center: bool = True) -> Cloud:
    """Augment, keep one random point a voxel (grid_coord (V, 3) int32 is added), crop, centre again.

    As officially, the crop comes after voxelisation and leaves the grid coordinates as they are. center False: no
    centring, before or after; turns are about the origin, where outdoors the sensor is.
    """
    cloud = augment(center_shift(cloud, z=True) if center else cloud, settings, rng)
    voxels = voxelize(cloud["coord"], grid_size)
    cloud = {**take(cloud, representatives(voxels, rng)), "grid_coord": voxels.grid_coord}
    count = len(cloud["coord"])
    for most in (settings.crop_share and max(1, int(settings.crop_share * count)), settings.crop_points):
        if most and len(cloud["coord"]) > most:
            cloud = sphere_crop(cloud, most, cloud["coord"][rng.integers(len(cloud["coord"]))])
    return center_shift(cloud, z=False) if center else cloud


# -- the precise test --------------------------------------------------------------------------------------------------

class View(NamedTuple):
    """One way to look at a test cloud: a turn about z, a factor, and whether x and y are mirrored."""

    degrees: float = 0.0
    factor: float = 1.0
    mirrored: bool = False


# The mirrored view equals the half turn up to rounding; it is kept because the published numbers come from 13 votes.
VIEWS = tuple(View(degrees, factor) for factor in (1.0, 0.95, 1.05) for degrees in (0, 90, 180, 270)) + (
    View(mirrored=True),)


def apply_view(cloud: Cloud, view: View) -> Cloud:
    """A cloud centred by center_shift(z=True) as `view` sees it."""
    cloud = flip(cloud, True, True) if view.mirrored else rotate(cloud, view.degrees, "z", (0, 0, 0))
    return scale(cloud, view.factor)
