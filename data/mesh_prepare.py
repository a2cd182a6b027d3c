"""From a mesh file to what a network needs of it, whatever the epoch: `prepare_mesh`, with a cache of arrays."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.mesh_features import (
    HEAT_RADII,
    HKS_EIGENPAIRS,
    FeatureSpec,
    face_geometry,
    face_neighbors,
    heat_kernel_signature,
    normalize_vertices,
    surface_descriptors,
    weld,
)
from data.mesh_glb import outside_buffers
from data.mesh_io import Mesh, read_mesh
from data.mesh_planes import plane_units
from utils.checks import check_choice
from utils.files import remove_leftovers_once, replacing

CACHE_VERSION = 4                   # raise it when prepare_mesh computes something else
STEPS_AN_EDGE = 50                  # of coordinates in 32 bits: with fewer, angles are wrong by half a degree and more
PLANE_DEGREES = 0.5                 # of the features plane and height: by so much normals in a flat piece differ


@dataclass(frozen=True)
class MeshSpec(FeatureSpec):
    """How meshes become tokens. It travels in every checkpoint, so that prediction prepares a mesh as training did.

    Raises ValueError for features that are unknown, none or named twice, and for sizes that are not above 0.
    """

    features: tuple[str, ...] = ("corners", "normal", "area", "angles", "curvature", "dihedral")
    faces_per_cluster: int = 32
    n_clusters: int | None = None           # a fixed number of clusters instead
    clustering: str = "bisection"           # bisection | connected | fps
    clusters_per_batch: int | None = None   # crops of that many neighbouring clusters (large meshes); None = whole
    unit: float | None = None               # metres that make one length unit; None = every mesh by its own size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model.clustering", self.clustering, ("bisection", "connected", "fps"))
        for name in ("faces_per_cluster", "n_clusters", "clusters_per_batch", "unit"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value}: expected a number above 0")


class PreparedMesh(NamedTuple):
    """vertices (V, 3) float32 normalised, faces (F, 3) int64 in file order, neighbors (F, 3) or None, area (F,) of the
    faces in squared length units, hks (F, 16) or None, descriptors (F, 64) of `surface_descriptors` or None, polygon
    (F,) int64, the file's face each triangle came from, or None where all are triangles, plane (F,) of `plane_units` or
    None; note: `coarse_coordinates` of the file."""

    vertices: np.ndarray
    faces: np.ndarray
    neighbors: np.ndarray | None
    area: np.ndarray
    hks: np.ndarray | None
    descriptors: np.ndarray | None
    polygon: np.ndarray | None
    plane: np.ndarray | None = None
    note: str = ""


def prepare_mesh(path: str | Path, spec: MeshSpec, cache_dir: str | Path | None = None,
                 descriptors: bool = False, read: Callable[[Path], Mesh] = read_mesh) -> PreparedMesh:
    """All that does not change from epoch to epoch, from the cache where the file and the settings are the same.

    descriptors: also the targets of pre-training. read: parses the file, where the cache has no entry. Raises what
    read_mesh raises, and ValueError where "hks" or descriptors are asked of a mesh too large for it, and for
    coordinates that 32 bits cannot hold.
    """
    names = {"vertices", "faces", "area", "polygon", "note"}
    if _wants_neighbors(spec):
        names.add("neighbors")
    if "hks" in spec.features:
        names.add("hks")
    settings = [CACHE_VERSION, spec.unit, spec.up, _wants_neighbors(spec), HKS_EIGENPAIRS if "hks" in names else 0]
    if _wants_planes(spec):
        names.add("plane")
        settings.append(("plane", PLANE_DEGREES))
    if descriptors:
        names.add("descriptors")
        settings.append((HKS_EIGENPAIRS, HEAT_RADII))
    arrays = cached_arrays(path, settings, names, cache_dir, lambda: _prepare(read(path), spec, path, descriptors))
    polygon = arrays["polygon"] if len(arrays["polygon"]) else None
    arrays = {**arrays, "polygon": polygon, "note": str(arrays["note"])}
    return PreparedMesh(**{name: arrays.get(name) for name in PreparedMesh._fields})


def _wants_neighbors(spec):
    return bool({"dihedral", "part", "height"} & set(spec.features)) or spec.clustering != "bisection"


def _wants_planes(spec):
    return bool({"plane", "height"} & set(spec.features))


def coarse_coordinates(vertices: np.ndarray, faces: np.ndarray) -> str:
    """A line for the user, or "": vertices (V, 3) that 32 bits hold exactly, in steps that show in the surface of faces
    (F, 3), as where UTM metres were stored as float. Nobody can tell them from a surface that is rough by itself."""
    with np.errstate(over="ignore"):
        stored = vertices.astype(np.float32)
    if not (stored == vertices).all():
        return ""
    largest = np.abs(vertices).max()
    step = np.spacing(np.float32(largest))
    edge = float(np.median(np.linalg.norm(vertices[faces[:, 0]] - vertices[faces[:, 1]], axis=1)))
    if STEPS_AN_EDGE * step <= edge or not np.ptp(vertices, axis=0).any():
        return ""
    return (f"coordinates up to {largest:,.0f} in 32 bits go in steps of {step:.2g}, and edges are {edge:.2g} long, "
            f"which changes the surface; export it with an offset taken off, or in 64 bits")


def _prepare(mesh, spec, path, descriptors):
    vertices, faces = weld(spec.z_up(mesh.vertices, path), mesh.faces)
    with np.errstate(over="ignore", invalid="ignore"):      # told below
        vertices = normalize_vertices(vertices, faces, spec.unit)
        stored = vertices.astype(np.float32)
    if not np.isfinite(stored).all():
        raise ValueError(f"{path}: coordinates up to {np.abs(mesh.vertices).max():g} are too large; repair the file, "
                         f"or correct model.unit")
    try:
        hks = heat_kernel_signature(vertices, faces) if descriptors or "hks" in spec.features else None
    except ValueError as error:
        hint = ""
        if descriptors:
            hint = "; the targets of pre-training need them too: set loss.delta=0 and masking.whole_share=0"
        raise ValueError(f"{path}: {error}{hint}") from None
    arrays = {"vertices": stored, "faces": faces, "note": np.array(coarse_coordinates(mesh.vertices, mesh.faces)),
              "polygon": np.empty(0, np.int64) if mesh.polygon is None else mesh.polygon,
              "neighbors": face_neighbors(faces) if _wants_neighbors(spec) else None,
              "area": face_geometry(vertices, faces)[2].astype(np.float32),
              "hks": hks if "hks" in spec.features else None,
              "plane": plane_units(vertices, faces, PLANE_DEGREES) if _wants_planes(spec) else None,
              "descriptors": surface_descriptors(vertices, faces, hks) if descriptors else None}
    return {name: value for name, value in arrays.items() if value is not None}


def cached_arrays(path: str | Path, settings: list, names: Collection[str], cache_dir: str | Path | None,
                  compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """compute() -> {name: array}, from the cache where the settings and the content of the file at path, with the
    buffers that a .glb has outside, are the same."""
    if cache_dir is None:
        return compute()
    data = Path(path).read_bytes()
    key = hashlib.sha256(data)
    for buffer in outside_buffers(Path(path), data):
        key.update(buffer.read_bytes())
    key.update(json.dumps([Path(path).suffix.lower(), *settings]).encode())
    entry = Path(cache_dir) / f"{key.hexdigest()[:32]}.npz"
    remove_leftovers_once(cache_dir)
    arrays = _read_cache(entry, names)
    if arrays is None:
        arrays = compute()
        entry.parent.mkdir(parents=True, exist_ok=True)
        with replacing(entry) as file:
            np.savez(file, **arrays)                        # a zip archive, which has checksums
    return arrays


def _read_cache(entry, names):
    try:
        with np.load(entry, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile):
        return None                                         # absent or damaged: prepared again, and written over
