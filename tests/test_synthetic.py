import json

import numpy as np
import pytest
import trimesh
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data import synthetic
from data.synthetic import Skeleton, decimate, fill_checkers, is_closed_sphere, make_mesh_set, surface_nets

SIZES = {"train": 12, "val": 2, "test": 5}
SMALL = (300, 500)


def read(path):
    lines = [line.split() for line in path.read_text().splitlines()]
    vertices = np.array([line[1:] for line in lines if line[0] == "v"], dtype=float)
    faces = np.array([line[1:] for line in lines if line[0] == "f"], dtype=int) - 1
    return vertices, faces, np.loadtxt(path.with_suffix(".txt"), dtype=int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    assert make_mesh_set(folder, *SIZES.values(), seed=3, faces=SMALL) == synthetic.MESH_CLASSES
    return folder


@pytest.fixture(scope="module")
def figures(folder):
    return {split: [read(path) for path in sorted((folder / split).glob("*.obj"))] for split in SIZES}


def ball(n=17, radius=0.7):
    grid = np.linspace(-1, 1, n)
    return np.sqrt((np.stack(np.meshgrid(grid, grid, grid, indexing="ij")) ** 2).sum(0)) - radius


# --- the set -----------------------------------------------------------------------------------------------------

def test_every_split_has_its_files_and_every_class(folder, figures):
    assert json.loads((folder / "classes.json").read_text()) == synthetic.MESH_CLASSES
    for split, count in SIZES.items():
        assert len(figures[split]) == count == len(list((folder / split).glob("*.txt")))
        assert set(np.concatenate([label for _, _, label in figures[split]])) == set(range(8))
    for _, faces, label in sum(figures.values(), []):
        assert len(faces) == len(label) and SMALL[0] - 1 <= len(faces) <= SMALL[1]


def test_figures_are_closed_connected_and_face_outwards(figures):
    for vertices, faces, _ in sum(figures.values(), []):
        mesh = trimesh.Trimesh(vertices, faces, process=False)
        assert mesh.is_watertight and mesh.is_winding_consistent and mesh.body_count == 1 and mesh.euler_number == 2
        assert mesh.volume > 0 and 0.3 < np.ptp(vertices, axis=0).max() < 3
        assert mesh.area_faces.min() > 1e-7 and len(np.unique(faces)) == len(vertices)


def test_parts_are_large_connected_regions(figures):
    """A label belongs to a place: nearly all neighbouring faces share it."""
    for vertices, faces, label in figures["test"]:
        pairs = trimesh.Trimesh(vertices, faces, process=False).face_adjacency
        assert (label[pairs[:, 0]] == label[pairs[:, 1]]).mean() > 0.8


def test_same_seed_same_bytes_and_splits_are_independent(folder, tmp_path):
    make_mesh_set(tmp_path, 2, 0, 1, seed=3, faces=SMALL)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(written) == 7
    assert all((tmp_path / path).read_bytes() == (folder / path).read_bytes() for path in written)
    first = (tmp_path / "train" / "centaur_000.obj").read_bytes()
    make_mesh_set(tmp_path, 1, 0, 0, seed=4, faces=SMALL)
    assert (tmp_path / "train" / "centaur_000.obj").read_bytes() != first
    assert (folder / "test" / "centaur_000.obj").read_bytes() != (folder / "train" / "centaur_000.obj").read_bytes()


def test_a_linear_model_on_face_features_is_near_the_majority_rate(figures):
    """The set must not be solvable face by face, or it shows nothing about a segmentation head."""
    def features(vertices, faces):
        corners = vertices[faces]                                                             # (F, 3, 3)
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        area = np.linalg.norm(normal, axis=1, keepdims=True)
        edges = np.roll(corners, -1, axis=1) - corners
        edges = edges / np.linalg.norm(edges, axis=2, keepdims=True)
        angles = np.sort(np.arccos(np.clip(-(edges * np.roll(edges, 1, axis=1)).sum(-1), -1, 1)), axis=1)
        return np.concatenate([normal / area, angles, np.log(area / area.mean()), corners.mean(1)], axis=1)

    x, x_test = (np.concatenate([features(v, f) for v, f, _ in figures[split]]) for split in ("train", "test"))
    y, y_test = (np.concatenate([label for _, _, label in figures[split]]) for split in ("train", "test"))
    majority = (y_test == np.bincount(y).argmax()).mean()
    scale = StandardScaler().fit(x)
    linear = LogisticRegression(max_iter=300).fit(scale.transform(x), y)
    accuracy = linear.score(scale.transform(x_test), y_test)
    print(f"majority {majority:.3f}, linear {accuracy:.3f}")
    assert majority < 0.35 and accuracy < majority + 0.08


# --- the pieces --------------------------------------------------------------------------------------------------

def test_bone_distance_by_hand():
    bone = Skeleton(np.zeros((1, 3)), np.array([[2.0, 0, 0]]), np.array([[0.5, 0.1]]), np.zeros(1, int))
    distance, away = synthetic.bone_distance(np.array([[1.0, 1, 0], [-3, 0, 0], [2, 0, 4]]), bone)
    assert distance[:, 0] == pytest.approx([1 - 0.3, 3 - 0.5, 4 - 0.1])
    assert away[:, 0] == pytest.approx(np.array([[0, 1.0, 0], [-1, 0, 0], [0, 0, 1]]))


def test_surface_nets_of_a_ball():
    vertices, faces = surface_nets(ball())
    radius = np.linalg.norm(vertices / 8 - 1, axis=1)
    assert abs(radius - 0.7).max() < 0.02 and is_closed_sphere(vertices, faces)
    volume = np.linalg.det((vertices / 8 - 1)[faces]).sum() / 6            # positive: normals point outwards
    assert volume == pytest.approx(4 / 3 * np.pi * 0.7 ** 3, rel=0.05)


def test_fill_checkers_removes_the_shared_edge():
    field = np.ones((5, 5, 5))
    field[2, 2, 2] = field[2, 3, 3] = -1
    assert not is_closed_sphere(*surface_nets(field))
    filled = fill_checkers(field)
    assert filled[2, 2, 3] < 0 and filled[2, 3, 2] < 0 and (filled < 0).sum() == 4 and (field < 0).sum() == 2
    assert is_closed_sphere(*surface_nets(filled))


@pytest.mark.parametrize("num_faces", [200, 100, 20])
def test_decimate_keeps_the_topology(num_faces):
    vertices, faces = surface_nets(ball())

    def move(points):
        return 8 + 5.6 * (points - 8) / np.linalg.norm(points - 8, axis=1, keepdims=True)

    vertices, faces = decimate(vertices, faces, num_faces, np.ones(len(vertices)), move, np.random.default_rng(0))
    assert len(faces) == num_faces and is_closed_sphere(vertices, faces)
    assert trimesh.Trimesh(vertices, faces, process=False).is_watertight
    outward = np.einsum("fi,fi->f", synthetic.face_normals(vertices, faces), vertices[faces].mean(1) - 8)
    assert (outward > 0).all()                                                               # no face was flipped over


def test_decimate_refuses_to_turn_faces_over():
    """Every collapse would throw its vertex to the other side of the ball: none may happen, and the loop must end."""
    vertices, faces = surface_nets(ball())
    kept, left = decimate(vertices, faces, 20, np.ones(len(vertices)), lambda p: 16 - p, np.random.default_rng(0))
    assert len(left) == len(faces) and np.array_equal(kept, vertices)


def test_is_closed_sphere_refuses_other_surfaces():
    mesh = trimesh.creation.icosphere(2)
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    assert is_closed_sphere(vertices, faces)
    assert not is_closed_sphere(vertices, faces[1:])                                         # a hole
    assert not is_closed_sphere(vertices, np.concatenate([faces[:1, ::-1], faces[1:]]))      # one face turned over
    two = np.concatenate([vertices, vertices + 9]), np.concatenate([faces, faces + len(vertices)])
    assert not is_closed_sphere(*two)
    torus = trimesh.creation.torus(0.5, 0.2)
    assert not is_closed_sphere(np.asarray(torus.vertices), np.asarray(torus.faces))
    both = np.concatenate([vertices, torus.vertices]), np.concatenate([faces, torus.faces + len(vertices)])
    assert not is_closed_sphere(*both)                                    # two pieces with the Euler number of one ball


# --- mistakes and the command line -------------------------------------------------------------------------------

@pytest.mark.parametrize("faces", [(100, 300), (500, 400)])
def test_bad_face_range(tmp_path, faces):
    with pytest.raises(ValueError, match=f"{faces[0]}.*at least 200"):
        make_mesh_set(tmp_path, 1, 0, 0, faces=faces)


def test_negative_count(tmp_path):
    with pytest.raises(ValueError, match="num_val=-1"):
        make_mesh_set(tmp_path, 0, -1, 0)


def test_command_line(tmp_path, capsys):
    counts = ["--num-train", "1", "--num-val", "0", "--num_test", "0"]
    assert len(synthetic.main(["mesh", str(tmp_path), *counts, "--faces", "300", "300"])) == 8
    assert len(list(tmp_path.rglob("*.obj"))) == 1 and "torso" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        synthetic.parse_args(["volumes", str(tmp_path)])
