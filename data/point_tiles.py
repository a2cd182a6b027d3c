"""A cloud too large for one forward pass, as square tiles with a margin around them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.point_files import BLOCK, PointCloud

MARGIN = 0.2                                # of a tile's side, on each side


def split_tiles(coord: np.ndarray, side: float) -> tuple[int, Iterator[tuple[np.ndarray, np.ndarray]]]:
    """Squares of `side` in x and y from the lowest corner on: their number, and for each that holds points (index,
    own): the points (M,) int64 of the square and of a margin of a fifth of `side` around it, in file order, and which
    of them (M,) bool are the square's own. Every point is some square's own once. Takes 6 to 8 bytes a point.

    coord (N, 3). Raises ValueError where there would be more than 10^8 squares.
    """
    low = np.array([coord[:, 0].min(), coord[:, 1].min()], np.float64)
    extent = np.array([coord[:, 0].max(), coord[:, 1].max()], np.float64) - low
    shape = np.floor(extent / side).astype(np.int64) + 1
    if shape.prod() > 1e8:
        raise ValueError(f"{shape[0]} x {shape[1]} tiles of {side:g} are too many; take a larger --tile")
    key = np.empty(len(coord), np.uint16 if shape.prod() < 1 << 16 else np.int32)     # 16 bits sort fastest
    for begin in range(0, len(coord), BLOCK):
        x, y = ((coord[begin:begin + BLOCK, :2] - low) / side).astype(np.int64).T
        key[begin:begin + BLOCK] = x * shape[1] + y
    count = np.bincount(key, minlength=shape.prod())
    end = count.cumsum()
    order = _sorted_by(key, count)
    del key

    def tiles():
        for tile in np.flatnonzero(count):
            x, y = divmod(int(tile), int(shape[1]))
            cells = _cells_around(x, y, *shape)
            index = np.concatenate([order[end[cell] - count[cell]:end[cell]] for cell in cells]).astype(np.int64)
            own = np.repeat(np.array(cells) == tile, count[cells])
            place = (coord[index, :2] - low) / side - (x, y)                            # of the square: 0..1
            near = own | ((place >= -MARGIN) & (place <= 1 + MARGIN)).all(1)
            index, own = index[near], own[near]
            rank = index.argsort()
            yield index[rank], own[rank]

    return int((count > 0).sum()), tiles()


def _sorted_by(key, count):
    """numpy.argsort(key, kind="stable") in a quarter of its memory: block by block into the place of each number."""
    order = np.empty(len(key), np.uint32 if len(key) < 1 << 32 else np.int64)
    place = count.cumsum() - count                                  # of the next point with each number
    for begin in range(0, len(key), BLOCK):
        block = key[begin:begin + BLOCK]
        index = np.argsort(block, kind="stable")
        numbers, first, times = np.unique(block[index], return_index=True, return_counts=True)
        rank = np.arange(len(block)) - np.repeat(first, times)
        order[np.repeat(place[numbers], times) + rank] = begin + index
        place[numbers] += times
    return order


def _cells_around(x, y, width, height):
    columns = range(max(0, y - 1), min(height, y + 2))
    return [i * height + j for i in range(max(0, x - 1), min(width, x + 2)) for j in columns]


def part_of(cloud: PointCloud, index: np.ndarray) -> PointCloud:
    """The points `index` (M,) of a cloud, without its warnings."""
    arrays = {name: values[index] for name, values in cloud._asdict().items() if isinstance(values, np.ndarray)}
    return PointCloud(**{"color": None, "normal": None, "label": None, **arrays},
                      extra={name: values[index] for name, values in cloud.extra.items()})
