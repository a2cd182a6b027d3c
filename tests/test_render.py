import time

import numpy as np
import pytest
import trimesh
from PIL import Image

from utils import render
from utils.render import IGNORE_COLOR, label_colors, palette, render_mesh, upright

SQUARE = np.array([[-1.0, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]])     # in the x-z plane, seen from the front
TWO = np.array([[0, 1, 2], [0, 2, 3]])


def turned_table(seed):
    """Corners (F, 3, 3) of a top on four thin legs, in a random orientation."""
    parts = [trimesh.creation.box((2, 1.4, 0.3))]
    parts += [trimesh.creation.box((0.12, 0.12, 1.2)).apply_translation((x, y, -0.75))
              for x in (-0.9, 0.9) for y in (-0.6, 0.6)]
    return trimesh.util.concatenate(parts).triangles @ rotation(seed).T


def rotation(seed):
    return trimesh.transformations.random_rotation_matrix(np.random.default_rng(seed).random(3))[:3, :3]


def picture(*args, **kwargs):
    return np.asarray(render_mesh(*args, **kwargs)).astype(int)


# --- colours -----------------------------------------------------------------------------------------------------

def test_palette_is_stable_and_distinct():
    assert np.array_equal(palette(5), palette(40)[:5]) and palette(40).dtype == np.uint8
    for num_classes, apart in ((8, 60), (20, 40), (200, 8)):
        colors = palette(num_classes).astype(int)
        distance = np.linalg.norm(colors[:, None] - colors, axis=-1) + 1000 * np.eye(num_classes)
        assert distance.min() > apart
        assert (np.ptp(colors, axis=1) > 20).all()                                            # grey is for "ignore"
    first = palette(3)
    first[:] = 0
    assert palette(3).any()                                                                   # a copy is handed out
    with pytest.raises(ValueError, match="num_classes=0"):
        palette(0)


def test_palette_in_the_eyes_of_a_deuteranope():
    """Vienot et al. 1999: matrix of linear RGB as seen without the green cones."""
    seen = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    colors = np.clip((palette(14) / 255.0) ** 2.2 @ seen.T, 0, 1) ** (1 / 2.2) * 255
    distance = np.linalg.norm(colors[:, None] - colors, axis=-1) + 1000 * np.eye(14)
    assert distance.min() > 25


def test_oklab_of_known_colours():
    """Values published with the definition: white is (1, 0, 0), pure red about (0.628, 0.225, 0.126)."""
    assert render._oklab(np.array([[255.0, 255, 255], [255, 0, 0]])) == pytest.approx(
        np.array([[1, 0, 0], [0.6280, 0.2249, 0.1258]]), abs=2e-4)


def test_label_colors():
    colors = palette(2)
    assert np.array_equal(label_colors(np.array([[1, -100], [0, 2]]), colors),
                          [[colors[1], IGNORE_COLOR], [colors[0], IGNORE_COLOR]])


# --- pictures ----------------------------------------------------------------------------------------------------

def test_a_square_fills_the_middle():
    image = picture(SQUARE, TWO, np.full((2, 3), 100), size=50, view=(0, 0), up="z")
    inside = (image != 255).all(-1)
    assert image.shape == (50, 50, 3) and inside.sum() == 46 * 46 and inside[2:48, 2:48].all()   # no seam, 0.92 wide
    assert len(np.unique(image[5:45, 5:45])) == 1


def test_coverage_against_a_loop():
    """Oracle: a point-in-triangle test and the depth of the plane, pixel by pixel."""
    rng = np.random.default_rng(0)
    triangles = rng.uniform(-3, 23, (40, 3, 3))
    expected = np.full((20, 20), -1)
    for row in range(20):
        for column in range(20):
            nearest = np.inf
            for i, corners in enumerate(triangles):
                matrix = np.concatenate([corners[:, :2].T, np.ones((1, 3))])
                weight = np.linalg.solve(matrix, [column + 0.5, row + 0.5, 1])
                if (weight >= 0).all() and weight @ corners[:, 2] < nearest:
                    nearest, expected[row, column] = weight @ corners[:, 2], i
    assert (expected >= 0).sum() > 200
    assert np.array_equal(render._cover(triangles, 20), expected)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_near_face_hides_the_far_one(order):
    """A red sheet before a blue one: the camera of view (0, 0) looks along +y."""
    vertices = np.array([[-1.0, 0, -1], [1, 0, -1], [0, 0, 1], [-1, 5, -1], [1, 5, -1], [0, 5, 1]])
    faces, colors = np.array([[0, 1, 2], [3, 4, 5]])[order], np.array([[255, 0, 0], [0, 0, 255]])[order]
    front = picture(vertices, faces, colors, size=40, view=(0, 0), up="z")
    back = picture(vertices, faces, colors, size=40, view=(180, 0), up="z")
    assert front[25, 20, 0] > 100 > 50 > front[25, 20, 2]
    assert back[25, 20, 2] > 100 > 50 > back[25, 20, 0]


@pytest.mark.parametrize("up, axis", [("x", 0), ("y", 1), ("z", 2)])
def test_up_is_up_and_not_mirrored(up, axis):
    """A blue ball above the red one; the green one, along the axis that right-handed order puts at right, at right."""
    balls, colors = [], []
    for direction, color in ((np.eye(3)[axis] * 3, (0, 0, 255)), (np.zeros(3), (255, 0, 0)),
                             (np.eye(3)[(axis + 1) % 3] * 3, (0, 255, 0))):
        ball = trimesh.creation.icosphere(2)
        ball.apply_translation(direction)
        balls.append(ball)
        colors.append(np.tile(color, (len(ball.faces), 1)))
    mesh = trimesh.util.concatenate(balls)
    image = picture(mesh.vertices, mesh.faces, np.concatenate(colors), size=60, view=(0, 0), up=up)
    center = [np.argwhere((image[..., c] > 100) & (image[..., c - 1] < 90)).mean(0) for c in range(3)]
    assert center[2][0] < center[0][0] - 20 and abs(center[2][1] - center[0][1]) < 3
    assert center[1][1] > center[0][1] + 20 and abs(center[1][0] - center[0][0]) < 3


def test_light_comes_from_the_upper_left():
    ball = trimesh.creation.icosphere(3)
    image = picture(ball.vertices, ball.faces, np.full((len(ball.faces), 3), 200), size=60)
    assert image[18, 22, 0] > image[30, 30, 0] > image[45, 42, 0] > 60
    inside_out = picture(ball.vertices, ball.faces[:, ::-1], np.full((len(ball.faces), 3), 200), size=60)
    assert np.array_equal(image, inside_out)                                  # both sides of a face are lit alike


def test_background_and_antialiasing():
    ball = trimesh.creation.icosphere(3)
    image = picture(ball.vertices, ball.faces, np.tile([200, 0, 0], (len(ball.faces), 1)), size=40)
    assert image.shape == (40, 40, 3) and image[0, 0].tolist() == [255] * 3 and image[20, 20, 1] == 0
    edge = (image[..., 1] > 0) & (image[..., 1] < 255)
    assert edge.sum() > 20 and image[edge][:, 0].min() > 90                   # an edge is between red and white


def test_position_and_scale_do_not_matter():
    table = turned_table(0)
    colors = np.tile(palette(4), (len(table) // 4, 1))
    faces = np.arange(3 * len(table)).reshape(-1, 3)
    image = picture(table.reshape(-1, 3), faces, colors, size=50)
    for scale, shift in ((1000, [6e5, 5e6, 300]), (1e-6, 0)):
        moved = picture(table.reshape(-1, 3) * scale + shift, faces, colors, size=50)
        assert (abs(image - moved).max(-1) > 8).mean() < 0.01


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_upright_stands_a_table_on_its_legs(turn):
    frame = upright(turned_table(turn))
    assert frame @ frame.T == pytest.approx(np.eye(3), abs=1e-9) and np.linalg.det(frame) == pytest.approx(1)
    assert frame[2] @ rotation(turn)[:, 2] > 0.99 and abs(frame[0] @ rotation(turn)[:, 0]) > 0.99


@pytest.mark.parametrize("corners", [trimesh.creation.box((3, 2, 1)).triangles, SQUARE[TWO],
                                     trimesh.creation.cone(1, 2).triangles @ rotation(5).T, turned_table(1)[4:]],
                         ids=["box", "sheet", "compact", "open"])
def test_upright_keeps_z_where_the_shape_says_nothing(corners):
    assert upright(corners)[2] == pytest.approx([0, 0, 1])


def test_edges_of_the_input():
    empty = picture(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3), np.uint8), size=20)
    assert empty.shape == (20, 20, 3) and (empty == 255).all()
    point = picture(np.ones((3, 3)), np.array([[0, 1, 2]]), np.zeros((1, 3)), size=20)       # no area: nothing to see
    assert (point == 255).all()
    stray = np.concatenate([SQUARE, [[np.nan, 9, 9]]])                                        # in no face
    assert (picture(stray, TWO, np.zeros((2, 3)), size=20, view=(0, 0), up="z") == 0).any()


def test_errors():
    with pytest.raises(ValueError, match="a colour a face"):
        render_mesh(SQUARE, TWO, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="NaN"):
        render_mesh(SQUARE * np.nan, TWO, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="'w'.*auto, x, y, z"):
        render_mesh(SQUARE, TWO, np.zeros((2, 3)), up="w")


def test_speed():
    """Limits are generous: this catches a loop over faces, not a busy machine."""
    ball = trimesh.creation.icosphere(6)                                                      # 81,920 faces
    colors = np.full((len(ball.faces), 3), 99)
    start = time.process_time()
    assert isinstance(render_mesh(ball.vertices, ball.faces, colors), Image.Image)
    assert time.process_time() - start < 5
