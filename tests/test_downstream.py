"""The per-face classifier: what is frozen, what is trained, and that a kept embedding is the embedding."""

import copy

import pytest
import torch
from torch import nn

from models.downstream import DownstreamClassifier
from models.nomeformer import Nomeformer
from tests.test_nomeformer import DG, SLOTS, E, N, mesh, pad

C, DEPTH = 4, 3


def classifier(unfrozen=0, head="mlp", seed=0, encoder=None, **changes):
    torch.manual_seed(seed)
    encoder = encoder or Nomeformer(DG, **{"embed_dim": E, "num_heads": 2, "num_attention_blocks": DEPTH, **changes})
    return DownstreamClassifier(encoder, C, head, unfrozen_layers=unfrozen)


def batch_of_two():
    one, other = pad(*mesh(), 7, 9), mesh(seed=1, clusters=7, slots=9)
    return [torch.cat(pair) for pair in zip(one, other, strict=True)]


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- head -----------------------------------------------------------------------------------------------------------

def test_head_is_the_documents():
    layers = [(type(m), getattr(m, "out_features", None)) for m in classifier().head]
    assert layers == [(nn.Linear, E // 2), (nn.LayerNorm, None), (nn.GELU, None), (nn.Dropout, None),
                      (nn.Linear, E // 4), (nn.LayerNorm, None), (nn.GELU, None), (nn.Dropout, None), (nn.Linear, C)]
    assert [m.p for m in classifier().head if isinstance(m, nn.Dropout)] == [0.1, 0.1]
    assert isinstance(classifier(head="linear").head, nn.Linear)


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("unfrozen", [0, 1, "all"])
def test_logits_of_every_slot(head, unfrozen):
    logits = classifier(unfrozen, head)(*batch_of_two())
    assert logits.shape == (2, 7, 9, C) and logits.isfinite().all()


# --- frozen and trained ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("unfrozen, blocks", [(0, []), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ("all", [0, 1, 2])])
def test_what_is_trained(unfrozen, blocks):
    model = classifier(unfrozen)
    names = trained(model)
    assert {name for name, _ in model.named_parameters() if name.startswith("head.")} <= names
    for i in range(DEPTH):
        of_block = {name for name, _ in model.named_parameters() if name.startswith(f"encoder.blocks.{i}.")}
        assert of_block <= names if i in blocks else not of_block & names
    assert ("encoder.norm.weight" in names) == (unfrozen != 0)
    assert ("encoder.embed.weight" in names) == ("encoder.summary_token" in names) == (unfrozen == "all")
    assert model.encoder_is_frozen == (unfrozen == 0)


@pytest.mark.parametrize("unfrozen", [0, 1, 2, "all"])
def test_gradient_reaches_every_trainable_parameter_and_no_frozen_one(unfrozen):
    model = classifier(unfrozen)
    logits = model(*batch_of_two())
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained(model)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)


@pytest.mark.parametrize("unfrozen", [0, 1])
def test_training_leaves_frozen_tensors_alone(unfrozen):
    model = classifier(unfrozen)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model(*batch_of_two()).square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained(model)


@pytest.mark.parametrize("unfrozen, training", [(0, []), (1, [2]), (2, [1, 2]), ("all", [0, 1, 2])])
def test_what_is_frozen_stays_in_eval_mode(unfrozen, training):
    model = classifier(unfrozen, dropout=0.5, drop_path=0.5)
    for _ in range(2):                                   # at once, and after train() was called on it or its parent
        for i, block in enumerate(model.encoder.blocks):
            assert all(m.training == (i in training) for m in block.modules())
        assert model.encoder.face_position.training == (unfrozen == "all")
        assert all(m.training for m in model.head.modules())
        nn.ModuleList([model]).eval().train()
    assert not any(m.training for m in model.eval().modules())


def test_frozen_encoder_gives_the_same_twice_and_as_in_eval():
    model, inputs = classifier(dropout=0.5, drop_path=0.5), batch_of_two()
    first = model.embed(*inputs)
    assert torch.equal(first, model.embed(*inputs)) and not first.requires_grad
    assert torch.equal(first, model.eval().embed(*inputs))
    assert not model.embed(inputs[0].requires_grad_(), *inputs[1:]).requires_grad        # no graph is kept
    trainable = classifier("all", dropout=0.5, drop_path=0.5)
    assert not torch.equal(trainable.embed(*inputs), trainable.embed(*inputs))


def test_an_encoder_that_was_frozen_before_is_trained_where_asked():
    encoder = Nomeformer(DG, E, 2, DEPTH).requires_grad_(False)
    model = classifier("all", encoder=encoder)
    assert trained(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("unfrozen", [DEPTH + 1, -1, "both", True, 1.5])
def test_impossible_number_of_layers(unfrozen):
    with pytest.raises(ValueError, match=f"must be 'all' or 0..{DEPTH}"):
        classifier(unfrozen)


# --- embeddings -----------------------------------------------------------------------------------------------------

def test_frozen_embedding_depends_on_nothing_but_its_mesh():
    """To the last bit: alone, or padded beside a larger mesh. This is what training.cache_features rests on."""
    model, one = classifier(), mesh()
    alone = model.embed(*one)
    assert torch.equal(model.embed(*batch_of_two())[:1, :N, :SLOTS], alone)
    assert torch.equal(model.embed(*(x[:1] for x in batch_of_two()))[:, :N, :SLOTS], alone)
    assert (model.embed(*batch_of_two())[0, N:] == 0).all()


@pytest.mark.parametrize("unfrozen", [0, "all"])
def test_embedding_is_the_encoders(unfrozen):
    model, inputs = classifier(unfrozen).eval(), batch_of_two()
    torch.testing.assert_close(model.embed(*inputs), model.encoder(*inputs), atol=1e-5, rtol=0)


def test_kept_embedding_in_place_of_the_encoder():
    model, inputs = classifier().eval(), batch_of_two()
    embedding = model.embed(*inputs)
    assert torch.equal(model(None, inputs[1], None, embedding=embedding), model(*inputs))


@pytest.mark.parametrize("unfrozen", [0, "all"])
def test_holes_in_the_mask_and_meshes_without_faces(unfrozen):
    model, (features, masks, centroid) = classifier(unfrozen).eval(), batch_of_two()
    masks[1, 2] = False
    masks[1, 0, 3] = False
    expected = model.encoder(features, masks, centroid)
    torch.testing.assert_close(model.embed(features, masks, centroid), expected, atol=1e-5, rtol=0)
    masks[0] = False
    assert (model.embed(features, masks, centroid)[0] == 0).all()
    assert model(features, masks, centroid).isfinite().all()
