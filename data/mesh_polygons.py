"""Polygons as triangles: fans where they cover the polygon, ear clipping where they do not."""

from __future__ import annotations

import numpy as np

FLAT = 1e-12            # doubled area, in the polygon's own size, below which three corners lie on a line


def triangulate(vertices: np.ndarray, corner: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Cut polygons into triangles with their corners' winding: vertices (V, 3), corner (all polygons' corners in a row)
    and count (P,), the corners of each, three or more -> slot (F, 3), numbers in that row, and polygon (F,), where each
    triangle comes from, in order (None: all are triangles).

    A polygon of n corners gives n - 2 triangles: the fan about its first corner, or, where a triangle of that fan turns
    against the polygon (seen along its mean normal), what `clip_ears` finds.
    """
    if (count == 3).all():
        return np.arange(len(corner)).reshape(-1, 3), None
    start = np.cumsum(count) - count
    polygon = np.repeat(np.arange(len(count)), count - 2)
    triangle = np.cumsum(count - 2) - (count - 2)                               # (P,) the first of each polygon
    step = np.arange(len(polygon)) - triangle[polygon]
    slot = np.stack([start[polygon], start[polygon] + step + 1, start[polygon] + step + 2], 1)
    cut = np.flatnonzero(count[polygon] > 3)
    point = vertices[corner[slot[cut]]]                                         # (F', 3, 3)
    cross = np.cross(point[:, 1] - point[:, 0], point[:, 2] - point[:, 0])
    normal = np.stack([np.bincount(polygon[cut], axis, len(count)) for axis in cross.T], 1)      # (P, 3)
    square = (normal**2).sum(1)
    turned = (cross * normal[polygon[cut]]).sum(1) < -1e-9 * square[polygon[cut]]
    for p in np.unique(polygon[cut[turned]]):
        points = vertices[corner[start[p]:start[p] + count[p]]]
        slot[triangle[p]:triangle[p] + count[p] - 2] = start[p] + clip_ears(_seen_along(normal[p], points))
    return slot, polygon


def _seen_along(normal, points):
    """points (n, 3) in the coordinate plane (n, 2) that `normal` is most upright on; it points to the viewer."""
    axis = int(np.abs(normal).argmax())
    plane = (points - points[0])[:, [(axis + 1) % 3, (axis + 2) % 3]]
    return plane if normal[axis] > 0 else plane[:, ::-1]


def clip_ears(points: np.ndarray) -> np.ndarray:
    """Triangles (n - 2, 3), counter-clockwise, of a polygon whose corners (n, 2) run counter-clockwise (Meisters 1975).

    Corners that coincide (the bridge to a hole) are allowed. Where a polygon crosses itself, and no ear is left, the
    flattest corner is cut off, so that there is always an answer.
    """
    x, y = (points / (np.abs(points).max() or 1.0)).T.tolist()

    def turn(a, b, c):
        return (x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a])

    def inside(a, b, c, p):
        return (turn(c, a, p) >= 0 and turn(a, b, p) >= 0 and turn(b, c, p) >= 0
                and not any(x[p] == x[q] and y[p] == y[q] for q in (a, b, c)))

    ring = list(range(len(x)))
    hollow = {b for a, b, c in zip(ring[-1:] + ring, ring, ring[1:] + ring[:1], strict=False) if turn(a, b, c) <= FLAT}
    out, at, since = [], 0, 0
    while len(ring) > 3:
        at %= len(ring)
        a, b, c = ring[at - 1], ring[at], ring[(at + 1) % len(ring)]
        forced = since >= len(ring)
        if not forced and (b in hollow or any(inside(a, b, c, p) for p in hollow)):
            at += 1
            since += 1
            continue
        if forced:
            at = min(range(len(ring)), key=lambda k: abs(turn(ring[k - 1], ring[k], ring[(k + 1) % len(ring)])))
            a, b, c = ring[at - 1], ring[at], ring[(at + 1) % len(ring)]
        out.append((a, b, c))
        hollow.discard(ring.pop(at))
        for k in (at - 1, at):                      # the neighbours have another angle now
            before, corner, after = ring[k - 1], ring[k % len(ring)], ring[(k + 1) % len(ring)]
            hollow.discard(corner)
            if turn(before, corner, after) <= FLAT:
                hollow.add(corner)
        at += 1
        since = 0
    return np.array([*out, ring])
