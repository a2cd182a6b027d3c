"""I-JEPA on mesh clusters: masks, teacher, predictor, loss, schedules, monitors."""

import copy

import numpy as np
import pytest
import torch
import trimesh

from data.mesh import Augmentation, MeshDataset, MeshSpec, custom_collate_fn
from data.mesh_masks import MaskedMeshes, MaskSpec, masked_collate_fn, sample_masks
from models.jepa import (
    Jepa,
    Predictor,
    momentum_at,
    prediction_loss,
    start_momentum,
    variance_covariance,
    weight_decay_at,
)
from models.jepa_monitors import MONITORS, check_monitors, monitor_values, parameter_distance
from models.nomeformer import Nomeformer

SPEC = MeshSpec(faces_per_cluster=8)


def points(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3))


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return Nomeformer(SPEC.feature_dim, **{"embed_dim": 16, "num_heads": 2, "num_attention_blocks": 2, **changes})


def jepa(seed=0, num_surface=0, **changes):
    return Jepa(encoder(seed, **changes), depth=2, num_heads=2, num_surface=num_surface)


def forward(model, batch):
    return model(batch["features"], batch["mask"], batch["centroid"], batch["visible"], batch["target"],
                 batch.get("descriptors"))


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Two bumpy spheres, of 80 and of 320 faces."""
    folder = tmp_path_factory.mktemp("meshes")
    for level in (1, 2):
        sphere = trimesh.creation.icosphere(subdivisions=level)
        scale = np.random.default_rng(level).uniform(0.8, 1.2, len(sphere.vertices))
        trimesh.Trimesh(sphere.vertices * scale[:, None], sphere.faces, process=False).export(folder / f"{level}.obj")
    return sorted(folder.glob("*.obj"))


def masked(files, views=0, seed=0, spec=SPEC, augmented=True):
    augmentation = Augmentation("so3", recluster=True) if augmented else Augmentation()
    return MaskedMeshes(MeshDataset(files, None, spec, augmentation=augmentation, views=views, seed=seed), MaskSpec(),
                        seed)


@pytest.fixture(scope="module")
def batch(meshes):
    data = masked(meshes)
    return masked_collate_fn([data[0], data[1]])


# -- masks -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N", [20, 47, 100, 800])
def test_masks_are_disjoint_regions_of_the_right_size(N):
    center = points(N)
    for seed in range(10):
        visible, target = sample_masks(center, MaskSpec(), np.random.default_rng(seed))
        assert not (visible & target).any()
        assert (0.15 * N <= target.sum(1)).all() and (target.sum(1) <= 0.20 * N).all()
        assert visible.sum() >= max(4, 0.1 * N) and len(target) == 4
        for block in target:                                # a ball: some centre has exactly these as its nearest
            distance = np.linalg.norm(center[block][:, None] - center[None], axis=-1)
            assert any(set(np.argsort(row)[:block.sum()]) == set(np.flatnonzero(block)) for row in distance)


@pytest.mark.parametrize("N", range(2, 20))
def test_any_number_of_clusters_from_two_has_context_and_a_target(N):
    for seed in range(20):
        visible, target = sample_masks(points(N, seed), MaskSpec(), np.random.default_rng(seed))
        assert visible.any() and target[0].any() and not (visible & target).any()


def test_context_is_the_complement_where_nothing_else_fits():
    visible, target = sample_masks(points(6), MaskSpec(context_scale=(0.2, 0.2)), np.random.default_rng(0))
    assert np.array_equal(visible, ~target.any(0))


def test_one_cluster_and_wrong_shares_are_refused():
    with pytest.raises(ValueError, match="faces_per_cluster"):
        sample_masks(points(1), MaskSpec(), np.random.default_rng(0))
    with pytest.raises(ValueError, match="masking.target_scale"):
        MaskSpec(target_scale=(0.2, 0.1))
    with pytest.raises(ValueError, match="num_mask_blocks"):
        MaskSpec(num_targets=0)


def test_masks_depend_on_seed_epoch_and_item_alone(meshes):
    data, other = masked(meshes, augmented=False), masked(meshes, augmented=False)      # the clusters stay the same
    other.set_epoch(3)
    _ = [other[i] for i in (1, 0, 1)]                       # what was drawn before does not matter
    data.set_epoch(3)
    assert torch.equal(data[1]["visible"], other[1]["visible"]) and torch.equal(data[1]["target"], other[1]["target"])
    data.set_epoch(4)
    assert not torch.equal(data[1]["target"], other[1]["target"])
    another = masked(meshes, seed=1, augmented=False)
    another.set_epoch(4)
    assert not torch.equal(another[1]["target"], data[1]["target"])
    fixed = masked(meshes, views=1)
    before = fixed[1]["target"]
    fixed.set_epoch(9)
    assert torch.equal(before, fixed[1]["target"])          # an evaluation set never changes


def test_a_share_of_the_meshes_is_shown_whole(meshes):
    part = MaskedMeshes(masked(meshes).dataset, MaskSpec(whole_share=0.5), 0)
    whole = []
    for epoch in range(40):
        part.set_epoch(epoch)
        item = part[0]
        whole.append(bool(item["visible"].all()))
        assert item["target"].any() != whole[-1]
    assert 10 < sum(whole) < 30
    with pytest.raises(ValueError, match="masking.whole_share=1.5"):
        MaskSpec(whole_share=1.5)


def test_padded_clusters_are_in_no_mask(batch):
    clusters = batch["mask"].any(-1)                        # (B, N)
    assert not clusters[0].all() and batch["target"].shape[1] == 4
    assert not (batch["visible"] & ~clusters).any() and not (batch["target"] & ~clusters[:, None]).any()


def test_a_mesh_of_one_cluster_is_named_before_training(meshes):
    with pytest.raises(ValueError, match=r"1.obj.*80 faces"):
        masked(meshes, spec=MeshSpec(faces_per_cluster=80))
    with pytest.raises(ValueError, match="clusters_per_batch"):
        masked(meshes, spec=MeshSpec(faces_per_cluster=8, clusters_per_batch=1))
    rest = masked(meshes, spec=MeshSpec(faces_per_cluster=8, clusters_per_batch=9), views=1)[1]  # 80 = 9 x 8 + 8 faces
    assert rest["visible"].tolist() == [True] and not rest["target"].any()


# -- student, teacher, predictor ---------------------------------------------------------------------------------------

def test_context_does_not_see_the_targets(batch):
    model = jepa().eval()
    noisy = {**batch, "features": batch["features"].clone()}
    hidden = ~batch["visible"]
    noisy["features"][hidden] = torch.randn_like(noisy["features"][hidden]) * 100
    clean, changed = forward(model, batch), forward(model, noisy)
    torch.testing.assert_close(changed.context, clean.context, atol=1e-6, rtol=0)
    torch.testing.assert_close(changed.prediction, clean.prediction, atol=1e-6, rtol=0)
    assert not torch.allclose(changed.target, clean.target, atol=1e-2)
    moved = {**batch, "features": batch["features"].clone()}
    moved["features"][batch["visible"]] += 1
    assert not torch.allclose(forward(model, moved).prediction, clean.prediction, atol=1e-4)


def test_teacher_sees_all_clusters_with_the_valid_mask(meshes, batch):
    """The padded batch gives what each mesh gives alone; a hidden cluster's features reach every cluster's output."""
    model, data = jepa().eval(), masked(meshes)
    output = forward(model, batch).output
    for b in (0, 1):
        alone = custom_collate_fn([data.dataset[b]])
        expected = model.target_encoder(alone["features"], alone["mask"], alone["centroid"])[0]
        clusters, slots = alone["mask"].shape[1:]
        torch.testing.assert_close(output[b, :clusters, :slots], expected, atol=1e-5, rtol=0)
        assert not output[b, clusters:].any()
    noisy = batch["features"].clone()
    noisy[1, batch["target"][1, 0].nonzero()[0]] += 5
    changed = model.target_encoder(noisy, batch["mask"], batch["centroid"])
    assert ((changed - output)[1].abs().amax((1, 2)) > 1e-6).all()


def test_targets_are_layer_normed_teacher_outputs(batch):
    model = jepa()
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.add_(0.1)                             # so that student and teacher differ
    out = forward(model, batch)
    slots = out.target[out.valid]
    assert out.prediction.shape == out.target.shape and not out.target.requires_grad
    torch.testing.assert_close(slots.mean(-1), torch.zeros(len(slots)), atol=1e-5, rtol=0)
    torch.testing.assert_close(slots.var(-1, unbiased=False), torch.ones(len(slots)), atol=1e-3, rtol=0)
    b, m, n = (int(i) for i in batch["target"].nonzero()[5])
    raw = model.target_encoder(batch["features"], batch["mask"], batch["centroid"])[b, n][batch["mask"][b, n]]
    raw = raw[0]
    expected = (raw - raw.mean()) / (raw.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(out.target[5, 0], expected, atol=1e-4, rtol=0)


def step(model, batch, optimizer, momentum=0.9):
    out = forward(model, batch)
    total, count = prediction_loss(out.prediction, out.target, out.valid)
    (total / count).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.update_target(momentum)


def test_teacher_is_the_moving_average_of_the_student(batch):
    model = jepa().train()
    assert not any(p.requires_grad for p in model.target_encoder.parameters())
    assert not model.target_encoder.training and model.encoder.training
    start = [p.clone() for p in model.target_encoder.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.encoder.feature_mean += 1
    step(model, batch, optimizer)
    for old, new, teacher in zip(start, model.encoder.parameters(), model.target_encoder.parameters(), strict=True):
        torch.testing.assert_close(teacher, 0.9 * old + 0.1 * new, atol=1e-6, rtol=0)
        assert teacher.grad is None
    assert torch.equal(model.target_encoder.feature_mean, model.encoder.feature_mean)
    for _ in range(3):
        step(model, batch, optimizer)
    assert parameter_distance(model.target_encoder, model.encoder) > 1e-3


@pytest.mark.parametrize("num_surface", [0, 5])
def test_gradient_reaches_the_whole_predictor_and_the_student(batch, num_surface):
    model, batch = jepa(num_surface=num_surface), {**batch}
    if num_surface:
        batch["descriptors"] = torch.randn(*batch["mask"].shape, num_surface)
    out = forward(model, batch)
    loss = prediction_loss(out.prediction, out.target, out.valid)[0]
    if num_surface:
        loss = loss + prediction_loss(out.described, out.descriptors, out.described_valid)[0]
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing or missing == [name for name in missing if name.startswith("encoder.blocks")]


def test_the_student_computes_its_own_clusters_alone_and_nothing_changes(batch):
    model = jepa().eval()
    context = model.encoder(batch["features"], batch["mask"], batch["centroid"], batch["visible"])     # hides the others
    out = forward(model, batch)
    for b, visible in enumerate(batch["visible"]):
        count = int(visible.sum())
        torch.testing.assert_close(out.context[b, :count], context[b, visible], atol=1e-5, rtol=0)
        assert not out.context[b, count:].any() and not out.seen[b, count:].any()


def test_descriptors_are_features_and_surroundings_standardised_of_hidden_and_visible_faces(batch):
    model = jepa(num_surface=2).eval()
    model.encoder.feature_mean[:], model.encoder.feature_std[:] = 0.5, 2.0
    model.descriptor_mean[:], model.descriptor_std[:] = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.5])
    known = torch.randn(*batch["mask"].shape, 2)
    out = forward(model, {**batch, "descriptors": known})
    b, _, n = batch["target"].nonzero(as_tuple=True)
    expected = torch.cat([(batch["features"] - 0.5) / 2, (known - torch.tensor([1.0, 2.0])) / torch.tensor([4.0, 0.5])], -1)
    visible = batch["mask"] & batch["visible"][..., None]
    wanted = out.descriptors[out.described_valid]
    hidden_count = int(batch["mask"][b, n].sum())
    torch.testing.assert_close(wanted[:hidden_count], expected[b, n][batch["mask"][b, n]])
    torch.testing.assert_close(wanted[hidden_count:], expected[visible])
    noisy = batch["features"].clone()
    noisy[~batch["visible"]] += 100
    changed = forward(model, {**batch, "features": noisy, "descriptors": known + 1})
    torch.testing.assert_close(changed.described[out.described_valid], out.described[out.described_valid], atol=1e-5, rtol=0)


def test_dropout_of_the_student_never_reaches_the_teacher(batch):
    model = jepa(dropout=0.5, drop_path=0.5).train()
    assert torch.equal(forward(model, batch).output, forward(model, batch).output)
    assert not torch.equal(forward(model, batch).context, forward(model, batch).context)


def test_faces_of_a_target_do_not_draw_its_surface(batch):
    """A face's prediction depends on its own centre and its cluster's, not on where the other faces are."""
    model = jepa().eval()
    out = forward(model, batch)
    b, _, n = (int(i) for i in batch["target"].nonzero()[0])
    moved = {**batch, "centroid": batch["centroid"].clone()}
    moved["centroid"][b, n, 1] += torch.tensor([0.3, 0, 0])             # two faces move and the cluster's centre stays
    moved["centroid"][b, n, 2] -= torch.tensor([0.3, 0, 0])
    change = (forward(model, moved).prediction - out.prediction)[0].abs().amax(-1)
    assert change[1] > 1e-4 and change[2] > 1e-4 and change[0] < 1e-5 and change[3:].max() < 1e-5


def test_target_blocks_are_predicted_apart(batch):
    """The places of one block tell nothing about another: its mask tokens are no keys there."""
    model = jepa().eval()
    other = batch["target"].clone()
    other[:, 1:] = False
    whole, alone = forward(model, batch), forward(model, {**batch, "target": other})
    first = batch["target"].nonzero(as_tuple=True)[1] == 0
    torch.testing.assert_close(whole.prediction[first], alone.prediction, atol=1e-5, rtol=0)


def test_padding_changes_no_prediction(meshes, batch):
    model, data = jepa().eval(), masked(meshes)
    whole = forward(model, batch)
    alone = forward(model, masked_collate_fn([data[0]]))
    count = len(alone.prediction)
    torch.testing.assert_close(whole.prediction[:count][whole.valid[:count]], alone.prediction[alone.valid],
                               atol=1e-5, rtol=0)


def test_predictor_width_must_suit_the_heads():
    with pytest.raises(ValueError, match="multiple of 8"):
        Predictor(20, 1, 4)


def test_a_batch_without_targets_has_loss_zero(batch):
    model = jepa()
    out = forward(model, {**batch, "target": torch.zeros_like(batch["target"])})
    total, count = prediction_loss(out.prediction, out.target, out.valid)
    total.backward()
    assert total == 0 and count == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# -- loss and schedules ------------------------------------------------------------------------------------------------

def test_prediction_loss_by_hand():
    prediction = torch.tensor([[[0.0, 2.0], [9.0, 9.0]], [[0.5, 0.0], [1.0, 1.0]]])
    total, count = prediction_loss(prediction, torch.zeros(2, 2, 2), torch.tensor([[True, False], [True, True]]))
    # smooth-L1: |d| - 0.5 from 1 on, d^2 / 2 below; means over the two features: 0.75, 0.0625, 0.5
    assert count == 3 and total.item() == pytest.approx(0.75 + 0.0625 + 0.5)


def test_variance_and_covariance_against_loops():
    x = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 2.0, 0.1])
    valid = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) > 0.3
    rows = np.array([x[b, t].tolist() for b in range(2) for t in range(30) if valid[b, t]])
    covariance = np.cov(rows.T)
    off = sum(covariance[i, j] ** 2 for i in range(3) for j in range(3) if i != j) / 3
    variance = sum(max(0.0, 1 - np.sqrt(covariance[i, i] + 1e-4)) for i in range(3)) / 3
    found = variance_covariance(x, valid)
    assert found[0].item() == pytest.approx(variance, rel=1e-5) and found[1].item() == pytest.approx(off, rel=1e-4)
    assert [t.item() for t in variance_covariance(x, torch.zeros_like(valid))] == [0.0, 0.0]


def test_schedules_at_start_middle_and_end():
    assert [momentum_at(t, 100, 0.9) for t in (0, 50, 100, 101)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert [weight_decay_at(t, 100, 0.04, 0.4) for t in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert weight_decay_at(25, 100, 0.04, 0.4) == pytest.approx(0.4 - 0.36 * 0.5 * (1 + np.cos(np.pi / 4)))
    auto = start_momentum("auto", 5000)
    assert 5000 / 20 <= 1 / (1 - auto) <= 5000 / 5 and start_momentum("auto", 3) == 0.0
    assert start_momentum(0.996, 10) == 0.996
    for wrong in (1.0, -0.1, "fast"):
        with pytest.raises(ValueError, match="ema.momentum"):
            start_momentum(wrong, 100)


# -- monitors ----------------------------------------------------------------------------------------------------------

BOUNDS = {"min_target_std": 0.1, "min_target_std_ratio": 0.2, "min_prediction_std": 0.01, "min_prediction_ratio": 0.2,
          "max_share_mesh": 0.5, "min_share_face": 0.03, "max_position_r2": 0.7, "min_content": 0.1,
          "min_effective_rank": 3.0, "min_teacher_moved": 0.01, "min_teacher_follow": 0.2, "max_teacher_student": 1.0}


def grid(B=3, N=6, slots=30, E=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(B, N, slots, E, generator=generator)
    masks = torch.rand(B, N, slots, generator=generator) > 0.1
    return output, masks, torch.randn(B, N, slots, 3, generator=generator)


def fired(values):
    return {line.split()[1] for line in check_monitors(values, BOUNDS, {})}


def test_healthy_outputs_pass_and_the_shares_agree_with_loops():
    output, masks, centroid = grid()
    output = output + torch.randn(3, 6, 1, 8, generator=torch.Generator().manual_seed(1))
    values = monitor_values(output, masks, centroid, shuffled=grid(seed=5)[0])
    assert not fired(values)
    rows = output[masks].double()
    between_mesh = between_cluster = 0.0
    for b in range(3):
        mesh = output[b][masks[b]].double()
        between_mesh += len(mesh) * (mesh.mean(0) - rows.mean(0)).square().sum().item()
        for n in range(6):
            part = output[b, n][masks[b, n]].double()
            between_cluster += len(part) * (part.mean(0) - mesh.mean(0)).square().sum().item()
    total = (rows - rows.mean(0)).square().sum().item()
    assert values["share_mesh"] == pytest.approx(between_mesh / total)
    assert values["share_cluster"] == pytest.approx(between_cluster / total)
    assert values["share_mesh"] + values["share_cluster"] + values["share_face"] == pytest.approx(1)
    assert values["target_std"] == pytest.approx(rows.std(0, unbiased=False).mean().item())
    singular = torch.linalg.svdvals(rows - rows.mean(0))
    share = singular / singular.sum()
    assert values["effective_rank"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)


def test_each_collapse_fires_its_monitor():
    output, masks, centroid = grid()
    assert "target_std" in fired(monitor_values(output * 0.01, masks, centroid))
    assert "share_face" in fired(monitor_values(output[:, :, :1].expand_as(output), masks, centroid))
    per_mesh = output[:, :1, :1].expand_as(output) + 0.3 * output
    assert fired(monitor_values(per_mesh, masks, centroid)) == {"share_mesh"}
    assert "effective_rank" in fired(monitor_values(output[..., :1].expand_as(output), masks, centroid))
    assert "content" in fired(monitor_values(output, masks, centroid, shuffled=output + 0.01))
    position = encoder(embed_dim=8).face_position(centroid)
    assert fired(monitor_values(position, masks, centroid)) >= {"position_r2"}
    assert monitor_values(position, masks, centroid)["position_r2"] > 0.999


def test_few_faces_leave_position_unmeasured_and_nan_elsewhere_fires():
    output, masks, centroid = grid(B=1, N=2, slots=20)
    values = monitor_values(output, masks, centroid)
    assert np.isnan(values["position_r2"]) and "position_r2" not in fired(values)
    assert "target_std" in fired({"target_std": float("nan")})


def test_messages_name_monitor_value_bound_and_meaning():
    values = {name: (-1.0 if side == "below" else 9.0) for name, (_, side, _) in MONITORS.items()}
    lines = check_monitors(values, BOUNDS, {})
    assert len(lines) == len(MONITORS)
    assert lines[0] == ("monitor target_std = -1 is below its bound monitor.min_target_std = 0.1: the teacher embeds "
                        "all faces (almost) alike: constant collapse")
    assert not any("\n" in line for line in lines)
    assert not check_monitors(values, dict.fromkeys(BOUNDS), {})             # null switches a monitor off


def test_a_bound_that_the_untrained_encoder_breaks_moves_with_it():
    untrained = {"position_r2": 0.8, "share_face": 0.02, "content": 0.01}
    assert not check_monitors({"position_r2": 0.87, "share_face": 0.019}, BOUNDS, untrained)
    lines = check_monitors({"position_r2": 0.9, "share_face": 0.017, "content": 0.01}, BOUNDS, untrained)
    assert [line.split()[1] for line in lines] == ["share_face", "position_r2", "content"]
    assert "(here 0.88, as it was 0.8 before training)" in lines[1]


def test_parameter_distance():
    first = encoder()
    second = copy.deepcopy(first)
    assert parameter_distance(first, second) == 0
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.5)
    assert parameter_distance(first, second) == pytest.approx(0.5)
