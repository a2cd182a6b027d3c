"""UPerNet and auxiliary head against transformers' UperNetHead and UperNetFCNHead on tiny random weights."""

from pathlib import Path

import torch

from models.upernet import FCNHead, UPerHead

GOLDEN = Path(__file__).parent / "golden" / "dinov3" / "upernet.pt"


def test_logits_and_names():
    golden = torch.load(GOLDEN, weights_only=True)
    config, features = golden["config"], golden["inputs"]["features"]
    channels = config["in_channels"]
    heads = torch.nn.ModuleDict({
        "decode_head": UPerHead(channels, config["num_classes"], config["hidden_dim"], config["pool_scales"]),
        "auxiliary_head": FCNHead(channels[config["aux_index"]], config["num_classes"], config["aux_channels"], config["aux_index"])})
    heads.load_state_dict(golden["state_dict"])              # strict: all names and shapes are the same
    heads.eval()
    torch.testing.assert_close(heads["decode_head"](features), golden["outputs"]["logits"], **golden["tolerance"])
    torch.testing.assert_close(heads["auxiliary_head"](features), golden["outputs"]["aux_logits"], **golden["tolerance"])
