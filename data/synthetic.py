"""Made-up labelled data, so that every script can be tried in minutes without downloading anything.

    python -m data.synthetic mesh datasets/figures --num-train 40 --num-val 10 --num-test 10 --seed 0
    python -m data.synthetic points datasets/rooms --num-train 40 --num-val 10 --num-test 10 --points 20000
    python -m data.synthetic terrain datasets/terrain --num-train 4 --num-val 2 --num-test 2 --points 60000
    python -m data.synthetic image datasets/demo_images --num-train 40 --num-val 8 --num-test 8 --size 160 120

Points: rooms with furniture, and aerial terrain, in data/synthetic_points.py. Images: streets, in
data/synthetic_images.py.

Meshes: jointed figures (bipeds, quadrupeds, centaurs, hexapods ...) with random proportions, poses, orientations and
tessellations. Each is ONE closed connected surface of genus 0: an implicit field around a skeleton of tapered capsules,
meshed by surface nets, then thinned by random edge collapses. A face carries the part of its nearest bone. Parts look
alike from nearby (all are tapered tubes): a linear model on a face's place, normal, angles and area stays at the
majority rate (23 % of faces right against 22 %). What tells a shin from a forearm is where it hangs: a random forest
on heat kernel signatures, which see the surroundings, gets 71 %.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.spatial.transform import Rotation

from data.synthetic_images import make_image_set
from data.synthetic_points import make_point_set, make_terrain_set
from utils.cli import ArgumentParser, run_main

MESH_CLASSES = ["torso", "neck", "head", "upper arm", "lower arm", "upper leg", "lower leg", "tail"]
TORSO, NECK, HEAD, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG, TAIL = range(len(MESH_CLASSES))

# Name, pairs of legs, pairs of arms, tail. The first has every part: a split that is not empty has all classes.
KINDS = [("centaur", 2, 1, True), ("biped", 1, 1, False), ("quadruped", 2, 0, True), ("saurian", 1, 1, True),
         ("biped", 1, 1, False), ("quadruped", 2, 0, True), ("hexapod", 3, 0, True), ("fourarmed", 1, 2, False)]

BLEND = 0.025        # width of the fillet where two bones meet, in units of about half a body length
MAX_CELL = 0.05      # largest grid cell: thin limbs are at least two cells thick
MAX_TRIES = 50


class Skeleton(NamedTuple):
    """Tapered capsules: start and end (B, 3) float64, radius at both ends (B, 2), part (B,) int64."""

    start: np.ndarray
    end: np.ndarray
    radius: np.ndarray
    part: np.ndarray


# -----------------------------------------------------------------------------------------------------------------
# Skeletons
# -----------------------------------------------------------------------------------------------------------------

def direction(azimuth: float, elevation: float) -> np.ndarray:
    """Unit vector (3,) from angles in radians: azimuth from x (forward) to y (left), elevation to z (up)."""
    return np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])


def random_skeleton(rng: np.random.Generator, leg_pairs: int, arm_pairs: int, tail: bool) -> Skeleton:
    """Jointed figure with x forward and z up: trunk, limbs with bent joints, neck, head and perhaps a tail."""
    bones = []                                                  # (start, end, radius at start, radius at end, part)

    def chain(start, steps, part_of_step):
        for step, radii, part in zip(steps, zip(radius_of[:-1], radius_of[1:], strict=True), part_of_step, strict=True):
            bones.append((start, start + step, *radii, part))
            start = start + step
        return start

    build = rng.uniform(0.85, 1.2)                              # slender or stout
    thick, limb = build * rng.uniform(0.125, 0.165), build * rng.uniform(0.075, 0.095)
    pelvis = np.zeros(3)
    front = pelvis + (leg_pairs - 1) * rng.uniform(0.45, 0.65) * direction(0, rng.uniform(-0.2, 0.3))
    top = front
    if leg_pairs > 1:
        bones.append((pelvis, front, thick, thick * rng.uniform(0.85, 1.1), TORSO))
    if arm_pairs or leg_pairs == 1:                             # an upright trunk
        lean = direction(rng.normal(0, 0.6), np.pi / 2 - abs(rng.normal(0, 0.25)))
        top = front + rng.uniform(0.45, 0.65) * (1 + 0.35 * (arm_pairs - 1)) * lean
        bones.append((front, top, thick * 0.9, thick, TORSO))

    for pair in range(leg_pairs):
        hip = pelvis + (front - pelvis) * pair / max(leg_pairs - 1, 1)
        upper, lower = rng.uniform(0.36, 0.5), rng.uniform(0.34, 0.48)
        knee_way = rng.choice([-1.0, 1.0])                      # both knees of a pair bend forward, or both backward
        for side in (-1, 1):
            swing, splay, bend = rng.uniform(-0.45, 0.45), rng.uniform(0.1, 0.4), knee_way * rng.uniform(0, 0.8)
            lateral = np.array([0, side * np.sin(splay), 0])
            thigh = np.array([np.sin(swing), 0, -np.cos(swing)]) * np.cos(splay) + lateral
            shin = np.array([np.sin(swing + bend), 0, -np.cos(swing + bend)]) * np.cos(splay) + lateral * 0.5
            foot = direction(side * rng.uniform(0, 0.5), rng.uniform(-0.3, 0.2))
            radius_of = limb * np.array([1.2, 1.0, 0.8, 0.7])
            chain(hip + np.array([0, side * thick * 0.75, -thick * 0.3]),
                  [upper * thigh, lower * shin, rng.uniform(0.1, 0.2) * foot], [UPPER_LEG, LOWER_LEG, LOWER_LEG])

    for pair in range(arm_pairs):
        shoulder = top + (front - top) * 0.45 * pair
        upper, lower = rng.uniform(0.3, 0.44), rng.uniform(0.28, 0.42)
        for side in (-1, 1):
            azimuth, elevation = rng.uniform(0.2, 1.9), rng.uniform(-1.1, 0.7)
            out = direction(side * azimuth, elevation)
            on = direction(side * (azimuth - rng.uniform(0, 1.0)), elevation + rng.uniform(-0.3, 0.9))
            radius_of = limb * np.array([1.1, 0.95, 0.8, 0.75])
            chain(shoulder + np.array([0, side * thick * 0.9, 0]),
                  [upper * out, lower * on, rng.uniform(0.06, 0.14) * on], [UPPER_ARM, LOWER_ARM, LOWER_ARM])

    upright = arm_pairs > 0 or leg_pairs == 1
    rise = rng.uniform(1.1, 1.6) if upright else rng.uniform(0.2, 1.1)
    reach = thick + rng.uniform(0.12, 0.22 if upright else 0.5)
    radius_of = limb * np.array([1.3, 1.0])
    throat = chain(top, [reach * direction(rng.normal(0, 0.3), rise)], [NECK])
    skull = limb * rng.uniform(1.3, 1.7)
    gaze = direction(rng.normal(0, 0.5), rng.uniform(-0.5, 0.4))
    bones.append((throat + 0.4 * skull * direction(0, rise), throat + (skull * rng.uniform(0.6, 1.6)) * gaze, skull,
                  skull * rng.uniform(0.5, 0.9), HEAD))

    if tail:
        azimuth, elevation = np.pi + rng.normal(0, 0.3), rng.uniform(-0.5, 0.7)
        curl = rng.normal(0, 0.45, 2)
        steps = [rng.uniform(0.2, 0.34) * direction(azimuth + i * curl[0], elevation + i * curl[1]) for i in range(3)]
        radius_of = limb * np.array([1.1, 0.9, 0.75, 0.6])
        chain(pelvis, steps, [TAIL] * 3)
    start, end, first, second, part = (np.array(column) for column in zip(*bones, strict=True))
    return Skeleton(start, end, np.stack([first, second], axis=1), part)


def bone_distance(points: np.ndarray, bones: Skeleton) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance (N, B) of points (N, 3) to each bone's surface, and unit vectors (N, B, 3) away from its axis."""
    axis = bones.end - bones.start                                                  # (B, 3)
    offset = points[:, None] - bones.start                                          # (N, B, 3)
    squared = np.maximum((axis ** 2).sum(-1), 1e-12)
    along = np.clip(np.einsum("nbi,bi->nb", offset, axis) / squared, 0, 1)          # (N, B) in [0, 1]
    offset -= along[..., None] * axis
    length = np.sqrt(np.einsum("nbi,nbi->nb", offset, offset))
    radius = bones.radius[:, 0] + along * (bones.radius[:, 1] - bones.radius[:, 0])
    return length - radius, offset / (length[..., None] + 1e-12)


def project(points: np.ndarray, bones: Skeleton, steps: int = 3) -> np.ndarray:
    """Points (N, 3) moved on to the blended surface by Newton steps along the gradient of the field."""
    for _ in range(steps):
        distance, away = bone_distance(points, bones)
        share = np.exp(-(distance - distance.min(1, keepdims=True)) / BLEND)        # (N, B) softmax of -distance
        field = distance.min(1) - BLEND * np.log(share.sum(1))
        gradient = np.einsum("nb,nbi->ni", share, away) / share.sum(1, keepdims=True)
        squared = np.maximum((gradient ** 2).sum(1), 0.1)                           # short steps where bones pull apart
        points = points - (np.clip(field, -0.05, 0.05) / squared)[:, None] * gradient
    return points


# -----------------------------------------------------------------------------------------------------------------
# Surfaces
# -----------------------------------------------------------------------------------------------------------------

def sample_field(bones: Skeleton, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Smooth union of the bones on a grid: field (X, Y, Z) float64, negative inside, and the grid's origin (3,).

    field = -BLEND * log(sum over bones of exp(-distance / BLEND)); a bone is added where it matters, in its own box.
    """
    reach = bones.radius.max(1, keepdims=True) + 6 * BLEND
    low, high = np.minimum(bones.start, bones.end) - reach, np.maximum(bones.start, bones.end) + reach
    origin = low.min(0) - 2 * cell
    total = np.zeros(np.ceil((high.max(0) - origin) / cell).astype(int) + 3)
    for i in range(len(bones.part)):
        first, last = np.floor((low[i] - origin) / cell).astype(int), np.ceil((high[i] - origin) / cell).astype(int)
        box = tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))
        points = np.stack(np.mgrid[box], axis=-1).reshape(-1, 3) * cell + origin
        distance, _ = bone_distance(points, Skeleton(*(value[i:i + 1] for value in bones)))
        total[box] += np.exp(-distance / BLEND).reshape(total[box].shape)
    return -BLEND * np.log(np.maximum(total, 1e-30)), origin


def fill_checkers(field: np.ndarray) -> np.ndarray:
    """A copy of the grid in which no square of four neighbours is inside on one diagonal and outside on the other.

    Four quads of the surface net would share one edge there. The outside corners, in a crease, are set just inside.
    """
    field = field.copy()
    while True:
        inside, found = field < 0, []
        for u, v in np.eye(3, dtype=int)[[[0, 1], [1, 2], [2, 0]]]:
            corners = [inside[tuple(slice(o, n - s + o) for o, s, n in zip(offset, u + v, inside.shape, strict=True))]
                       for offset in (0 * u, u, v, u + v)]
            checker = np.argwhere((corners[0] == corners[3]) & (corners[1] == corners[2]) & (corners[0] != corners[1]))
            found += [checker, checker + u, checker + v, checker + u + v]
        found = np.concatenate(found)
        if not len(found):
            return field
        at = tuple(found.T)
        field[at] = np.where(inside[at], field[at], -1e-3)


def surface_nets(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero level of a grid (X, Y, Z): vertices (V, 3) in grid units, triangles (F, 3) int64, normals to the positive.

    Surface nets (Gibson 1998) without the relaxation: one vertex per cell the surface passes, at the mean of the
    crossings on the cell's edges; one quad per crossed edge, joining the four cells around it. The grid's border must
    be positive.
    """
    inside = field < 0
    position, count, quads = np.zeros((field.size, 3)), np.zeros(field.size), []
    strides = np.array([field.shape[1] * field.shape[2], field.shape[2], 1])    # a cell is named by its lowest corner
    for axis in range(3):
        here = [slice(None)] * 3
        there = [slice(None)] * 3
        here[axis], there[axis] = slice(None, -1), slice(1, None)
        corner = np.argwhere(inside[tuple(here)] != inside[tuple(there)])       # (E, 3) lower ends of crossed edges
        at, to = field[tuple(corner.T)], field[tuple((corner + np.eye(3, dtype=int)[axis]).T)]
        crossing = corner.astype(float)
        crossing[:, axis] += at / (at - to)
        b, c = strides[(axis + 1) % 3], strides[(axis + 2) % 3]
        cells = (corner @ strides)[:, None] - np.array([0, b, b + c, c])        # (E, 4) around the edge
        for column in cells.T:
            np.add.at(position, column, crossing)
            np.add.at(count, column, 1)
        quads.append(np.where((at < 0)[:, None], cells, cells[:, ::-1]))
    quads = np.concatenate(quads)
    used = np.flatnonzero(count)
    vertices = position[used] / count[used, None]
    quads = np.searchsorted(used, quads)
    diagonal = np.linalg.norm(vertices[quads[:, 0]] - vertices[quads[:, 2]], axis=1)
    other = np.linalg.norm(vertices[quads[:, 1]] - vertices[quads[:, 3]], axis=1)
    quads = np.where((other < diagonal)[:, None], np.roll(quads, 1, axis=1), quads)  # cut the short way
    return vertices, np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def face_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(F, 3) cross products, twice the area long."""
    a, b, c = vertices[faces].swapaxes(0, 1)
    return np.cross(b - a, c - a)


def unique_edges(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undirected edges (E, 2) int64 with the smaller vertex first, and the number of faces at each (E,)."""
    ends = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    num_vertices = int(faces.max()) + 1
    key, count = np.unique(ends @ [num_vertices, 1], return_counts=True)     # np.unique(axis=0) is ten times slower
    return np.stack(np.divmod(key, num_vertices), axis=1), count


def is_closed_sphere(vertices: np.ndarray, faces: np.ndarray) -> bool:
    """True for one closed, consistently oriented, connected manifold of genus 0."""
    edges, count = unique_edges(faces)
    directed = faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2) @ [len(vertices), 1]
    if (count != 2).any() or len(np.unique(directed)) != len(directed):
        return False
    links = sparse.coo_matrix((np.ones(len(edges)), edges.T), shape=(len(vertices),) * 2)
    pieces, _ = sparse.csgraph.connected_components(links, directed=False)
    return pieces == 1 and len(vertices) - len(edges) + len(faces) == 2


def decimate(vertices: np.ndarray, faces: np.ndarray, num_faces: int, weight: np.ndarray,
             move: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Collapse short edges to their middle until num_faces are left; weight (V,) multiplies lengths (large: fine).

    Works in rounds of collapses that do not touch one another: an edge goes if it is the cheapest of all edges around
    its neighbours, unless that would change the topology (link condition: exactly two common neighbours) or flip a
    face. move maps points (N, 3) back on to the surface. -> vertices, faces; more than num_faces if no edge could go.
    """
    frozen = np.zeros(len(vertices))                # grows where a collapse was refused, so that others get a turn
    idle = 0                                                        # rounds in which no edge could go
    while len(faces) > num_faces and idle < 10:
        edges, _ = unique_edges(faces)
        n = len(vertices)
        both_ways = np.concatenate([edges, edges[:, ::-1]]).T
        adjacency = sparse.csr_matrix((np.ones(2 * len(edges)), both_ways), shape=(n, n))
        length = np.linalg.norm(vertices[edges[:, 0]] - vertices[edges[:, 1]], axis=1)
        cost = length * weight[edges].mean(1) * rng.uniform(0.8, 1.25, len(edges)) * (1 + frozen[edges].sum(1))
        lowest = np.full(n, np.inf)                                     # the cheapest edge at a vertex
        np.minimum.at(lowest, edges.ravel(), np.repeat(cost, 2))
        around = lowest.copy()                                          # ... and around its neighbours
        np.minimum.at(around, edges.ravel(), lowest[edges[:, ::-1]].ravel())
        chosen = edges[cost <= around[edges].min(1)]
        keep, gone = chosen.T
        common = np.asarray(adjacency[keep].multiply(adjacency[gone]).sum(1)).ravel()
        placed = move((vertices[keep] + vertices[gone]) / 2)

        moved = vertices.copy()
        moved[keep] = moved[gone] = placed
        owner = np.full(n, -1)                                          # the collapse that moves a vertex
        owner[keep] = owner[gone] = np.arange(len(chosen))
        face_owner = owner[faces].max(1)                                # (F,) at most one collapse touches a face
        bends = (face_owner >= 0) & ((owner[faces] >= 0).sum(1) == 1)   # the others vanish or stay as they are
        before, after = face_normals(vertices, faces[bends]), face_normals(moved, faces[bends])
        cosine = (before * after).sum(1) / (np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1) + 1e-30)
        valid = common == 2
        valid[face_owner[bends][cosine < 0.3]] = False
        frozen *= 0.7
        frozen[chosen[~valid].ravel()] += 2
        accepted = np.flatnonzero(valid)[:(len(faces) - num_faces + 1) // 2]
        if not len(accepted):
            idle += 1
            continue
        idle, target = 0, np.arange(n)
        target[gone[accepted]] = keep[accepted]
        vertices = vertices.copy()
        vertices[keep[accepted]] = placed[accepted]
        faces = target[faces]
        faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
        used, faces = np.unique(faces, return_inverse=True)
        vertices, weight, frozen, faces = vertices[used], weight[used], frozen[used], faces.reshape(-1, 3)
    return vertices, faces


def make_figure(rng: np.random.Generator, kind: tuple, num_faces: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One figure: vertices (V, 3) float64, faces (F, 3) int64, label (F,) int64; F is num_faces, made even."""
    num_faces -= num_faces % 2                             # a closed surface: 3 F = 2 E
    for _ in range(MAX_TRIES):
        bones = random_skeleton(rng, *kind[1:])
        area = (np.pi * bones.radius.sum(1) * np.linalg.norm(bones.end - bones.start, axis=1)).sum()
        cell = min(MAX_CELL, np.sqrt(area / (1.2 * num_faces)))
        field, origin = sample_field(bones, cell)
        vertices, faces = surface_nets(fill_checkers(field))
        if not is_closed_sphere(vertices, faces):          # parts that touch make a handle: another pose
            continue
        vertices = project(vertices * cell + origin, bones)
        waves = np.sin(vertices @ rng.normal(0, 3, (3, 4)) + rng.uniform(0, 2 * np.pi, 4)).mean(1)
        weight = np.exp(rng.uniform(0.2, 1.2) * waves)     # the tessellation varies, but not with the parts
        vertices, faces = decimate(vertices, faces, num_faces, weight, partial(project, bones=bones, steps=2), rng)
        if len(faces) == num_faces and is_closed_sphere(vertices, faces):
            distance, _ = bone_distance(vertices[faces].mean(1), bones)
            return vertices, faces, bones.part[distance.argmin(1)]
    raise RuntimeError(f"no closed {kind[0]} of {num_faces} faces in {MAX_TRIES} tries")


def make_mesh_set(folder: str | Path, num_train: int, num_val: int, num_test: int, seed: int = 0,
                  faces: tuple[int, int] = (600, 1500)) -> list[str]:
    """Write folder/{train,val,test}/NAME.obj with NAME.txt (one 0-based label a line) and folder/classes.json.

    faces: smallest and largest number of faces of a figure. Figures are turned at random and scaled to about unit size;
    vertices and faces are in random order. The same seed writes the same bytes; a split does not change with the size
    of another. Existing files of the same names are replaced. Returns the class names.
    """
    folder = Path(folder)
    if not 200 <= faces[0] <= faces[1]:
        raise ValueError(f"faces={tuple(faces)}: give the smallest and the largest number of faces, both at least 200")
    counts = {"train": num_train, "val": num_val, "test": num_test}
    for split, count in counts.items():
        if count < 0:
            raise ValueError(f"num_{split}={count}: the number of figures cannot be negative")
    for number, (split, count) in enumerate(counts.items()):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng([seed, number, i])
            kind = KINDS[i % len(KINDS)]
            vertices, triangles, label = make_figure(rng, kind, int(rng.integers(faces[0], faces[1] + 1)))
            vertices = Rotation.random(rng=rng).apply(vertices - vertices.mean(0)) * rng.uniform(0.4, 0.6)
            vertex_order, face_order = rng.permutation(len(vertices)), rng.permutation(len(triangles))
            triangles = np.argsort(vertex_order)[triangles][face_order]
            lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices[vertex_order]]
            lines += [f"f {a} {b} {c}" for a, b, c in triangles + 1]
            path = folder / split / f"{kind[0]}_{i:03d}.obj"
            path.write_text("\n".join(lines) + "\n")
            path.with_suffix(".txt").write_text("\n".join(map(str, label[face_order])) + "\n")
    (folder / "classes.json").write_text(json.dumps(MESH_CLASSES, indent=2) + "\n")
    return list(MESH_CLASSES)


def parse_args(argv=None):
    parser = ArgumentParser(prog="python -m data.synthetic", description=__doc__)
    parser.add_argument("kind", choices=["mesh", "points", "terrain", "image"],
                        help="mesh: jointed figures, OBJ files with one label a face; points: rooms, a label a point; "
                             "terrain: aerial tiles of 60 m; "
                             "image: streets, a label a pixel")
    parser.add_argument("folder", help="where to write; existing files of the same names are replaced")
    parser.add_argument("--num-train", type=int, default=40)
    parser.add_argument("--num-val", type=int, default=10)
    parser.add_argument("--num-test", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faces", type=int, nargs=2, default=(600, 1500), metavar=("MIN", "MAX"), help="of a mesh")
    parser.add_argument("--points", type=int, default=20_000, help="of a room or a tile")
    parser.add_argument("--size", type=int, nargs=2, default=(160, 120), metavar=("W", "H"), help="of an image")
    return parser.parse_args(argv)


def main(argv=None) -> list[str]:
    args = parse_args(argv)
    if args.kind == "points":
        names = make_point_set(args.folder, args.num_train, args.num_val, args.num_test, args.seed, args.points)
    elif args.kind == "terrain":
        names = make_terrain_set(args.folder, args.num_train, args.num_val, args.num_test, args.seed, args.points)
    elif args.kind == "image":
        names = make_image_set(args.folder, args.num_train, args.num_val, args.num_test, args.seed, tuple(args.size))
    else:
        names = make_mesh_set(args.folder, args.num_train, args.num_val, args.num_test, args.seed, tuple(args.faces))
    what = {"mesh": "figures", "points": "rooms", "terrain": "tiles", "image": "streets"}[args.kind]
    print(f"{args.num_train} + {args.num_val} + {args.num_test} {what} in {args.folder}; classes: {', '.join(names)}")
    return names


if __name__ == "__main__":
    run_main(main)
