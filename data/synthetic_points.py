"""Made-up labelled point clouds: rooms with walls, floor and furniture of random sizes, places and colours; and, below,
aerial laser scans of terrain with houses, trees, cars and wires.

A room is a list of surfaces (sides of boxes, mantles and lids of cylinders); points are drawn evenly over their area,
as a scanner would see them: no undersides, a few millimetres of noise. Colours are drawn per piece of furniture from
one range for all, so that they say little about the class; shape, height and surroundings do.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.losses import IGNORE_INDEX

POINT_CLASSES = ["wall", "floor", "table", "chair", "sofa", "bookshelf", "box", "lamp"]
WALL, FLOOR, TABLE, CHAIR, SOFA, BOOKSHELF, BOX, LAMP = range(len(POINT_CLASSES))
POINT_PALETTE = [[174, 199, 232], [152, 223, 138], [255, 152, 150], [188, 189, 34], [140, 86, 75], [197, 176, 213],
                 [255, 187, 120], [227, 119, 194]]
NOISE = 0.003                               # metres, normal
FLAT, MANTLE, LID = range(3)                # kinds of surfaces
CLUTTER = IGNORE_INDEX                      # small things that nobody labelled


class Room(NamedTuple):
    """coord (N, 3) float32 metres, z up, floor at 0; color (N, 3) uint8; normal (N, 3) float32, outwards; label (N,)
    int64, IGNORE_INDEX for clutter."""

    coord: np.ndarray
    color: np.ndarray
    normal: np.ndarray
    label: np.ndarray


class _Surfaces:
    """Collects surfaces: FLAT origin + a u + b v; MANTLE and LID of an upright cylinder, u = (radius, height, 0)."""

    def __init__(self, rng):
        self.rng, self.rows = rng, []
        self.turn, self.place = np.eye(3), np.zeros(3)          # of the piece of furniture being built

    def put(self, place, yaw):
        cosine, sine = np.cos(yaw), np.sin(yaw)
        self.turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        self.place = np.array([*place, 0.0])

    def add(self, kind, origin, u, v, normal, area, label, color):
        turned = (u, v, normal) if kind != FLAT else (self.turn @ vector for vector in (u, v, normal))
        self.rows.append((kind, self.place + self.turn @ np.asarray(origin), *turned, area, label, color))

    def flat(self, origin, u, v, label, color):
        normal = np.cross(u, v)
        area = np.linalg.norm(normal)
        self.add(FLAT, origin, np.asarray(u), np.asarray(v), normal / area, area, label, color)

    def box(self, low, size, label, color):
        """All sides but the lower one of a box with its corner at low (3,) and size (3,)."""
        low, (x, y, z) = np.asarray(low, float), np.diag(size)
        self.flat(low + z, x, y, label, color)
        for origin, u, v in ((low, x, z), (low + x, y, z), (low + x + y, -x, z), (low + y, -y, z)):
            self.flat(origin, u, v, label, color)

    def cylinder(self, low, radius, height, label, color):
        shape = np.array([radius, height, 0.0])
        zero = np.zeros(3)
        self.add(MANTLE, low, shape, zero, zero, 2 * np.pi * radius * height, label, color)
        self.add(LID, low, shape, zero, zero, np.pi * radius ** 2, label, color)

    def legs(self, width, depth, height, thick, label, color):
        for x in (-width / 2, width / 2 - thick):
            for y in (-depth / 2, depth / 2 - thick):
                self.box((x, y, 0), (thick, thick, height), label, color)

    def color(self):
        return self.rng.uniform(40, 220) + self.rng.uniform(-45, 45, 3)


def _table(s, rng):
    width, depth, height = rng.uniform(0.9, 1.8), rng.uniform(0.6, 1.0), rng.uniform(0.65, 0.8)
    color = s.color()
    if rng.random() < 0.3:                                      # a round one
        s.cylinder((0, 0, height - 0.04), depth / 2 + 0.1, 0.04, TABLE, color)
        s.cylinder((0, 0, 0), 0.06, height - 0.04, TABLE, color)
    else:
        s.box((-width / 2, -depth / 2, height - 0.04), (width, depth, 0.04), TABLE, color)
        s.legs(width, depth, height - 0.04, 0.06, TABLE, color)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(-0.2, 0.2, 2)
        s.box((x, y, height), rng.uniform(0.05, 0.2, 3), CLUTTER, s.color())


def _chair(s, rng):
    width, height, back = rng.uniform(0.4, 0.5), rng.uniform(0.4, 0.5), rng.uniform(0.35, 0.55)
    color = s.color()
    s.box((-width / 2, -width / 2, height - 0.04), (width, width, 0.04), CHAIR, color)
    s.box((-width / 2, width / 2 - 0.04, height), (width, 0.04, back), CHAIR, color)
    s.legs(width, width, height - 0.04, 0.04, CHAIR, color)


def _sofa(s, rng):
    width, depth, seat = rng.uniform(1.3, 2.1), rng.uniform(0.75, 0.95), rng.uniform(0.38, 0.45)
    color = s.color()
    s.box((-width / 2, -depth / 2, 0.05), (width, depth, seat), SOFA, color)
    s.box((-width / 2, depth / 2 - 0.2, seat), (width, 0.2, rng.uniform(0.3, 0.45)), SOFA, color)
    for x in (-width / 2, width / 2 - 0.15):
        s.box((x, -depth / 2, seat), (0.15, depth - 0.2, 0.2), SOFA, color)


def _bookshelf(s, rng):
    width, depth, height = rng.uniform(0.7, 1.3), rng.uniform(0.25, 0.35), rng.uniform(1.3, 2.1)
    color = s.color()
    for x in (-width / 2, width / 2 - 0.03):
        s.box((x, -depth / 2, 0), (0.03, depth, height), BOOKSHELF, color)
    s.box((-width / 2, depth / 2 - 0.02, 0), (width, 0.02, height), BOOKSHELF, color)
    for z in np.linspace(0.05, height - 0.03, rng.integers(4, 7)):
        s.box((-width / 2, -depth / 2, z), (width, depth - 0.02, 0.03), BOOKSHELF, color)
        if z < height - 0.1:                                    # books
            s.box((-width / 2 + 0.05, 0, z + 0.03), (rng.uniform(0.2, width - 0.1), 0.1, 0.2), BOOKSHELF, s.color())


def _box(s, rng):
    size = rng.uniform(0.25, 0.7, 3)
    s.box((-size[0] / 2, -size[1] / 2, 0), size, BOX, s.color())


def _lamp(s, rng):
    height = rng.uniform(1.3, 1.7)
    color = s.color()
    s.cylinder((0, 0, 0), 0.15, 0.03, LAMP, color)
    s.cylinder((0, 0, 0.03), 0.02, height, LAMP, color)
    s.cylinder((0, 0, height), rng.uniform(0.15, 0.22), 0.25, LAMP, s.color())


# What, radius of its footprint, whether its back stands against a wall, fewest and most in 20 square metres.
FURNITURE = ((_table, 1.0, False, 1, 2), (_sofa, 0.9, True, 1, 1), (_bookshelf, 0.6, True, 1, 2),
             (_chair, 0.35, False, 2, 4), (_box, 0.45, False, 1, 3), (_lamp, 0.25, False, 1, 2))


def make_room(rng: np.random.Generator, num_points: int, size: tuple[float, float, float] | None = None) -> Room:
    """A room of num_points points. size: width, depth and height in metres; None: 3.5 to 6, 3 to 5, 2.4 to 2.8.

    The points lie on 60 to 110 square metres; at a grid of 2 cm, 100,000 of them fill about 90,000 voxels. The room is
    turned at random about z and stands near the origin. Raises ValueError for a room without points.
    """
    if num_points < 1:
        raise ValueError(f"num_points={num_points}: expected 1 or more")
    width, depth, height = size or (rng.uniform(3.5, 6), rng.uniform(3, 5), rng.uniform(2.4, 2.8))
    s = _Surfaces(rng)
    s.flat((0, 0, 0), (width, 0, 0), (0, depth, 0), FLOOR, s.color())
    paint = s.color()
    for origin, u in (((0, 0, 0), (width, 0, 0)), ((width, 0, 0), (0, depth, 0)),
                      ((width, depth, 0), (-width, 0, 0)), ((0, depth, 0), (0, -depth, 0))):
        s.flat(origin, (0, 0, height), u, WALL, paint)          # in this order the normal looks into the room
    taken: list[tuple] = []
    for build, radius, at_wall, fewest, most in FURNITURE:
        times = width * depth / 20
        for _ in range(max(1, round(times * rng.integers(fewest, most + 1)))):
            place, yaw = _find_place(rng, (width, depth), radius, at_wall, taken)
            if place is not None:
                taken.append((*place, radius))
                s.put(place, yaw)
                build(s, rng)
    return _sample(s.rows, num_points, rng)


def _find_place(rng, room, radius, at_wall, taken):
    """A free place for a round footprint, and a turn; (None, 0) after many tries: a full room."""
    if radius > min(room) / 2:
        return None, 0.0
    for _ in range(100):
        place = np.array([rng.uniform(radius, side - radius) for side in room])
        yaw = rng.uniform(0, 2 * np.pi)
        if at_wall:                                             # the back is the +y side of the piece
            axis, far = rng.integers(2), rng.integers(2)
            place[axis] = (room[axis] - radius * 0.55) if far else radius * 0.55
            yaw = ((np.pi / 2, -np.pi / 2), (np.pi, 0.0))[axis][far]
        if all(np.hypot(place[0] - x, place[1] - y) > 0.85 * (radius + other) for x, y, other in taken):
            return place, yaw
    return None, 0.0


def _sample(rows, num_points, rng):
    kind, origin, u, v, normal, area, label, color = map(np.array, zip(*rows, strict=True))
    which = rng.choice(len(area), num_points, p=area / area.sum())
    a, b = rng.random((2, num_points))
    kind, normal = kind[which], normal[which]                                       # (N,), (N, 3)
    shape, angle = u[which], 2 * np.pi * a
    around = np.stack([np.cos(angle), np.sin(angle), np.zeros(num_points)], 1)
    up = np.array([0, 0, 1.0])
    flat = a[:, None] * u[which] + b[:, None] * v[which]
    mantle = shape[:, :1] * around + b[:, None] * shape[:, 1:2] * up
    lid = shape[:, :1] * np.sqrt(b)[:, None] * around + shape[:, 1:2] * up
    chosen = [kind[:, None] == FLAT, kind[:, None] == MANTLE, kind[:, None] == LID]
    coord = origin[which] + np.select(chosen, [flat, mantle, lid])
    normal = np.select(chosen, [normal, around, np.broadcast_to(up, normal.shape)])
    light = 0.8 + 0.2 * normal @ np.array([0.36, 0.48, 0.8]) + 0.05 * np.sin(3 * coord[:, 0] + 2 * coord[:, 1])
    color = color[which] * light[:, None] + rng.normal(0, 8, (num_points, 3))
    coord += rng.normal(0, NOISE, coord.shape)
    yaw = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return Room((coord @ turn.T).astype(np.float32), np.clip(color, 0, 255).astype(np.uint8),
                (normal @ turn.T).astype(np.float32), label[which])


# -- aerial terrain ----------------------------------------------------------------------------------------------------

TERRAIN_CLASSES = ["ground", "vegetation", "building", "car", "wire"]
TERRAIN_CODES = [2, 5, 6, 64, 14]           # the same in LAS files: ASPRS, and 64, which it leaves to users
GROUND, VEGETATION, BUILDING, CAR, WIRE = range(len(TERRAIN_CLASSES))
TERRAIN_PALETTE = [[170, 150, 110], [60, 150, 60], [200, 80, 70], [60, 100, 220], [240, 200, 40]]
BRIGHTNESS = (900, 700, 1100, 1000, 600)    # mean intensity of each class, far apart compared with neither street nor
BRIGHTNESS_SPREAD = 300                     # its normal spread
ORIGIN = (448_000.0, 5_411_000.0, 310.0)    # of map coordinates: metres east, north and up


class Terrain(NamedTuple):
    """coord (N, 3) float64 map coordinates in metres; intensity (N,) uint16; return_number, number_of_returns (N,)
    uint8; label (N,) int64 of TERRAIN_CLASSES."""

    coord: np.ndarray
    intensity: np.ndarray
    return_number: np.ndarray
    number_of_returns: np.ndarray
    label: np.ndarray


def make_terrain(rng: np.random.Generator, num_points: int, size: float = 60.0) -> Terrain:
    """An aerial laser scan of `size` metres square: hills, a street with cars, houses and sheds, trees and hedges,
    wires over all. Each pulse comes straight down and hits what is highest, or goes through a crown, and then has two
    returns. Roofs may be flat and as large as a yard; hedges and sheds are as large as cars: surroundings tell them
    apart. Raises ValueError for no points."""
    if num_points < 1:
        raise ValueError(f"num_points={num_points}: expected 1 or more")
    wires = num_points // 100
    x, y = rng.uniform(0, size, (2, num_points - wires))
    ground = _hills(rng, size)
    z = ground(x, y) + rng.normal(0, 0.03, len(x))
    label = np.full(len(x), GROUND)
    returns = np.ones((2, len(x)), np.uint8)                                # number of this return, and of all
    middle = rng.uniform(0.35, 0.65) * size                                 # of the street, which runs along x
    street = np.abs(y - middle) < 4
    area = size ** 2 / 3600
    taken: list[tuple] = []

    def place(radius):
        spot = (*rng.uniform(0, size, 2), radius)
        free = all(np.hypot(spot[0] - a, spot[1] - b) > radius + c for a, b, c in taken)
        if not free or abs(spot[1] - middle) < 5 + radius:
            return None
        taken.append(spot)
        return spot

    for _ in range(round(16 * area)):
        _house(rng, place(rng.choice([3.0, 7.0, 9.0])), x, y, z, ground, label)
    for _ in range(round(8 * area)):
        spot = (rng.uniform(0, size), middle + rng.choice([-3.0, 3.0]) + rng.normal(0, 0.3), 0)
        _car(rng, spot, rng.normal(0, 0.05) + (rng.random() < 0.15) * np.pi / 2, x, y, z, ground, label)
    for _ in range(round(90 * area)):
        _plant(rng, place(rng.uniform(0.8, 3.5)), x, y, z, ground, label, returns)
    coord = np.concatenate([np.stack([x, y, z], 1), _wires(rng, wires, size, ground)])
    label = np.concatenate([label, np.full(wires, WIRE)])
    returns = np.concatenate([returns, np.ones((2, wires), np.uint8)], 1)
    intensity = np.array(BRIGHTNESS)[label] + rng.normal(0, BRIGHTNESS_SPREAD, num_points)
    intensity[:len(x)] -= 350 * (street & (label[:len(x)] == GROUND))
    intensity = np.clip(intensity / returns[1], 1, 65535).astype(np.uint16)
    order = rng.permutation(num_points)
    return Terrain((coord + ORIGIN)[order], intensity[order], returns[0][order], returns[1][order], label[order])


def _hills(rng, size):
    """z (...) of x, y: a few waves and a slope, several metres over the tile."""
    direction, phase = rng.uniform(0, 2 * np.pi, (2, 4))
    length, amplitude = rng.uniform(0.4, 1.5, 4) * size, rng.uniform(0.5, 2.0, 4)
    slope = rng.uniform(-0.08, 0.08, 2)

    def height(x, y):
        waves = [a * np.sin(2 * np.pi * (np.cos(d) * x + np.sin(d) * y) / wide + p)
                 for a, d, wide, p in zip(amplitude, direction, length, phase, strict=True)]
        return sum(waves) + slope[0] * x + slope[1] * y
    return height


def _local(spot, yaw, x, y):
    """Coordinates along and across a thing at `spot` that is turned by yaw."""
    dx, dy = x - spot[0], y - spot[1]
    return np.cos(yaw) * dx + np.sin(yaw) * dy, np.cos(yaw) * dy - np.sin(yaw) * dx


def _house(rng, spot, x, y, z, ground, label):
    """A house with a gable or a flat roof, or a shed, and a few points on its walls."""
    if spot is None:
        return
    along, across = _local(spot, rng.uniform(0, np.pi), x, y)
    long, wide = spot[2] * rng.uniform(0.7, 0.8), spot[2] * rng.uniform(0.45, 0.6)          # half lengths
    eaves = ground(*spot[:2]) + (rng.uniform(2.0, 2.6) if spot[2] < 4 else rng.uniform(2.8, 6.5))
    pitch = 0.0 if spot[2] < 4 or rng.random() < 0.4 else rng.uniform(0.4, 0.9)
    inside = (np.abs(along) < long) & (np.abs(across) < wide)
    roof = eaves + pitch * (wide - np.abs(across)) + rng.normal(0, 0.03, len(x))
    wall = inside & ((np.abs(along) > long - 0.15) | (np.abs(across) > wide - 0.15)) & (rng.random(len(x)) < 0.5)
    z[inside] = roof[inside]
    z[wall] = rng.uniform(ground(*spot[:2]), eaves, wall.sum())
    label[inside] = BUILDING


def _car(rng, spot, yaw, x, y, z, ground, label):
    along, across = _local(spot, yaw, x, y)
    long, wide, high = rng.uniform(1.9, 2.5), rng.uniform(0.8, 1.0), rng.uniform(1.4, 1.9)
    inside = (np.abs(along) < long) & (np.abs(across) < wide) & (label == GROUND)
    body = np.where(np.abs(along + 0.15 * long) < 0.6 * long, high, 0.6 * high)                 # cabin, bonnet and boot
    z[inside] = (ground(x, y) + body + rng.normal(0, 0.03, len(x)))[inside]
    label[inside] = CAR


def _plant(rng, spot, x, y, z, ground, label, returns):
    """A tree, through whose crown a third of the pulses goes, or a hedge."""
    if spot is None:
        return
    base = ground(*spot[:2])
    if spot[2] < 1.6:                                                       # as large as a car
        along, across = _local(spot, rng.uniform(0, np.pi), x, y)
        long, wide, high = rng.uniform(1.5, 2.8), rng.uniform(0.6, 1.1), rng.uniform(1.0, 2.0)
        inside = (np.abs(along) < long) & (np.abs(across) < wide) & (label == GROUND)
        z[inside] = base + high * rng.uniform(0.75, 1.0, inside.sum())
        label[inside] = VEGETATION
        return
    away = ((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / spot[2] ** 2
    crown, lowest = rng.uniform(3.0, 8.0), rng.uniform(1.0, 3.0)
    inside = (away < 1) & (label == GROUND)
    hit = inside & (rng.random(len(x)) < 0.67)
    depth = rng.beta(1, 2.5, len(x))                                                        # most near the top
    top = base + lowest + crown * (0.5 + 0.5 * np.sqrt(np.clip(1 - away, 0, 1)))
    z[hit] = (top - depth * crown * np.sqrt(np.clip(1 - away, 0, 1)))[hit]
    label[hit] = VEGETATION
    returns[1][inside] = 2
    returns[0][inside & ~hit] = 2


def _wires(rng, count, size, ground):
    """(count, 3) points on three sagging wires across the tile."""
    begin, end = rng.uniform(0, size, (2, 2))
    axis = rng.integers(2)
    begin[axis], end[axis] = 0, size
    beside = np.array([end[1] - begin[1], begin[0] - end[0]]) / np.hypot(*(end - begin))
    part = rng.random(count)
    lane = rng.integers(0, 3, count)
    flat = begin + part[:, None] * (end - begin) + (1.2 * (lane - 1))[:, None] * beside
    sag = rng.uniform(3, 8) * part * (1 - part)
    high = (1 - part) * ground(*begin) + part * ground(*end) + rng.uniform(9, 12) - sag
    high += rng.normal(0, 0.02, count) + 0.5 * (lane == 1)
    inside = np.clip(flat, 0, size)
    return np.column_stack([inside, high])


def make_terrain_set(folder: str | Path, num_train: int, num_val: int, num_test: int, seed: int = 0,
                     num_points: int = 60_000) -> list[str]:
    """Write folder/{train,val,test}/tile_000.npz (coord, intensity, return_number, number_of_returns, and
    classification with TERRAIN_CODES, as LAS files have it) and folder/classes.json. The same seed writes the same
    bytes. Returns the class names."""
    def tile(rng):
        terrain = make_terrain(rng, num_points)
        return {**terrain._asdict(), "label": None, "classification": np.array(TERRAIN_CODES, np.uint8)[terrain.label]}

    classes = {"classes": TERRAIN_CLASSES, "palette": TERRAIN_PALETTE}
    return _write_set(folder, {"train": num_train, "val": num_val, "test": num_test}, seed, "tile", tile, classes)


def _write_set(folder, splits, seed, name, make, classes):
    folder = Path(folder)
    for number, (split, count) in enumerate(splits.items()):
        if count < 0:
            raise ValueError(f"num_{split}={count}: the number of {name}s cannot be negative")
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            arrays = make(np.random.default_rng([seed, number, i]))
            np.savez(folder / split / f"{name}_{i:03d}.npz", **{key: value for key, value in arrays.items()
                                                                if value is not None})
    (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    return list(classes["classes"])


def make_point_set(folder: str | Path, num_train: int, num_val: int, num_test: int, seed: int = 0,
                   num_points: int = 20_000) -> list[str]:
    """Write folder/{train,val,test}/room_000.npz (coord, color, normal, segment int64 with -1 = nothing) and
    folder/classes.json. The same seed writes the same bytes; a split does not change with the size of another. Existing
    files of the same names are replaced. Returns the class names."""
    def room(rng):
        made = make_room(rng, num_points)
        return {"coord": made.coord, "color": made.color, "normal": made.normal,
                "segment": np.where(made.label == IGNORE_INDEX, -1, made.label)}

    classes = {"classes": POINT_CLASSES, "palette": POINT_PALETTE, "ignore_index": -1}
    return _write_set(folder, {"train": num_train, "val": num_val, "test": num_test}, seed, "room", room, classes)
