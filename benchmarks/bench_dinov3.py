"""Speed and memory of the DINOv3 backbone and the Mask2Former head: against Hugging Face transformers, and on a GPU.

    python benchmarks/bench_dinov3.py vit      # a backbone's forward pass, ours and DINOv3ViTModel, the same weights
    python benchmarks/bench_dinov3.py m2f      # head, matching, losses and backward on given maps, ours and theirs
    python benchmarks/bench_dinov3.py cache    # epochs of the training scripts with --cache-features and without
    python benchmarks/bench_dinov3.py gpu --peak-tflops 790     # whole training steps in bfloat16, needs CUDA
    python benchmarks/bench_dinov3.py m2f --shapes 512x1 --num-heads 8 --ffn-dim 1024

vit and m2f need transformers, which nothing else here does. They run by turns in one process and give ratios, theirs
/ ours; the peak memory is that of a process each, above what it held before the first pass. Times on the CPU are CPU
seconds with one thread, wall-clock seconds with more: other work disturbs the first little.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_linear_head  # noqa: E402
import train_m2f_head  # noqa: E402
import train_upernet_head  # noqa: E402
from data.synthetic_images import IMAGE_CLASSES, make_image_set  # noqa: E402
from models.dinov3 import BACKBONES, FrozenBackbone, VisionTransformer, ViTConfig, backbone_name  # noqa: E402
from models.dinov3_adapter import DINOv3_Adapter  # noqa: E402
from models.dinov3_weights import load_vit  # noqa: E402
from models.mask2former import Mask2FormerHead, Mask2FormerSegmenter  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import autocast, describe, pick_device, trim_memory  # noqa: E402
from utils.image_scripts import prepare  # noqa: E402
from utils.log import read_log  # noqa: E402
from utils.mask_losses import SetCriterion  # noqa: E402

SHAPES = {"vit": ["224x4", "512x1"], "m2f": ["256x2"], "cache": ["128x4"], "gpu": ["512x8", "896x4"]}
GPU_BACKBONES = ["dinov3_vits16", "dinov3_vitl16", "dinov3_vit7b16"]
FORMATS = ("float32", "autocast", "bfloat16")       # autocast: to bfloat16; bfloat16: the weights are held in it too
SCRIPTS = {"linear": train_linear_head, "m2f": train_m2f_head, "upernet": train_upernet_head}
NUM_CLASSES, PER_IMAGE = 150, 10                    # as in ADE20K, where an image has about ten of them
NO_TRANSFORMERS = ("vit and m2f compare with transformers: pip install --no-deps transformers==5.23.0, and pip install "
                   "huggingface_hub tokenizers safetensors regex pyyaml, which it needs")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=(*SHAPES, "all", "memory"), help="memory: one side alone, in this process")
    parser.add_argument("--backbone", nargs="+", help="default: dinov3_vits16; gpu: S, L and 7B")
    parser.add_argument("--shapes", nargs="+", metavar="SIDExBATCH", help="of the images, such as 512x1")
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=list(FORMATS), help="vit: number formats")
    parser.add_argument("--scripts", choices=SCRIPTS, nargs="+", default=list(SCRIPTS), help="cache: of which")
    parser.add_argument("--hidden-dim", type=int, help="of the head; default: 256, for the 7B 2048")
    parser.add_argument("--num-heads", type=int, default=16)
    parser.add_argument("--ffn-dim", type=int, default=4096)
    parser.add_argument("--num-points", type=int, default=12544)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="gpu: less memory, more time")
    parser.add_argument("--repeats", type=int, default=5, help="of each side; cache: epochs that count")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", help="default: cpu; gpu: cuda")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="gpu: of the card, dense bfloat16")
    parser.add_argument("--of", choices=("vit", "m2f"), default="vit", help="memory: of what")
    parser.add_argument("--side", choices=("ours", "theirs"), default="ours", help="memory: whose")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    part = args.of if args.part == "memory" else args.part
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes or SHAPES.get(part, [])]
    default = GPU_BACKBONES if part == "gpu" else ["dinov3_vits16"]
    args.backbone = [backbone_name(name) for name in args.backbone or default]
    return args


# -- measuring ---------------------------------------------------------------------------------------------------------

def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def by_turns(sides: dict, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call; who goes first alternates. One call of each before does not count."""
    seconds = {name: [] for name in sides}
    for function in sides.values():
        function()
    for i in range(repeats):
        for name in list(sides)[::-1 if i % 2 else 1]:
            start = clock(device)
            sides[name]()
            seconds[name].append(clock(device) - start)
    return seconds


def peak_mib(device: torch.device, reset: bool = False) -> float:
    """The most memory held since the last reset (which only Linux can do), or since the start."""
    if reset:
        gc.collect()
        trim_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":                             # ru_maxrss starts with the peak of the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20            # bytes on macOS


def memory(args) -> float:
    """MiB that two passes of one side need above what was held before; printed for the process that started this."""
    device = pick_device(args.device or "cpu")
    sides = {"vit": vit_sides, "m2f": m2f_sides}[args.of](args, *args.shapes[0], args.formats[0], [args.side])
    before = peak_mib(device, reset=True)
    for _ in range(2):
        sides[args.side]()
    print(f"peak {peak_mib(device) - before:.1f}")
    return peak_mib(device) - before


def peak_alone(args, part: str, side: str, size: int, batch: int, number: str) -> float:
    """`memory` in a process of its own."""
    same = {"backbone": args.backbone[0], "device": args.device or "cpu", "hidden-dim": args.hidden_dim or 256,
            **{name: getattr(args, name) for name in ("num_heads", "ffn_dim", "num_points", "threads")}}
    words = [sys.executable, __file__, "memory", "--of", part, "--side", side, "--shapes", f"{size}x{batch}",
             "--formats", number, *(str(word) for name, value in same.items() for word in (f"--{name}", value))]
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split("peak ")[1])


def compare(args, part: str, build, formats, what: str) -> list[dict]:
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(NO_TRANSFORMERS)
    device, rows = pick_device(args.device or "cpu"), []
    print(describe(device), flush=True)
    for (size, batch), number in itertools.product(args.shapes, formats):
        peak = [peak_alone(args, part, side, size, batch, number) for side in ("ours", "theirs")]
        sides = build(args, size, batch, number, ["ours", "theirs"])
        difference = [f"{float((a - b).abs().max() / b.abs().max()):.1e}"
                      for a, b in zip(sides["ours"](), sides["theirs"](), strict=True)]
        seconds = by_turns(sides, args.repeats, device).values()
        (ours, our_least), (theirs, their_least) = ((1000 * statistics.median(s), 1000 * min(s)) for s in seconds)
        rows.append({"size": size, "batch": batch, "format": number, "peak": peak, "ratio": theirs / ours})
        print(f"  {size} px, batch {batch}, {number}: ours {ours:.0f} ms (least {our_least:.0f}), theirs {theirs:.0f} "
              f"({their_least:.0f}): theirs / ours {theirs / ours:.2f} ({their_least / our_least:.2f}); peak "
              f"{peak[0]:.0f} and {peak[1]:.0f} MiB; relative difference of {what}: "
              f"{', '.join(difference)}", flush=True)
    return rows


# -- ours and theirs ---------------------------------------------------------------------------------------------------

def vit_sides(args, size: int, batch: int, number: str, names) -> dict:
    """All tokens after the final norm of random images, without gradient. Theirs attends through PyTorch's SDPA, too,
    which is its default. bfloat16: ours holds the linear weights in it, as in training; theirs all of the model."""
    c, device = BACKBONES[args.backbone[0]], pick_device(args.device or "cpu")
    torch.manual_seed(0)
    parts = [1, c.num_registers, (size // c.patch_size) ** 2]
    image, sides, state = torch.randn(batch, 3, size, size, device=device), {}, None
    amp_dtype, held = (None if number == "float32" else torch.bfloat16), number == "bfloat16"

    def add(name, tokens, dtype):                           # class, registers, patches
        @torch.no_grad()
        def forward():
            with autocast(device, dtype):
                return tokens()
        sides[name] = forward

    if "theirs" in names:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
        theirs = DINOv3ViTModel(DINOv3ViTConfig(
            patch_size=c.patch_size, hidden_size=c.embed_dim, intermediate_size=c.ffn_hidden, num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads, layer_norm_eps=c.norm_eps, rope_theta=c.rope_base, query_bias=c.qkv_bias,
            value_bias=c.qkv_bias, use_gated_mlp=c.ffn != "mlp", num_register_tokens=c.num_registers)).eval()
        theirs.requires_grad_(False)                        # frozen as ours, or autocast would keep what it casts
        state = theirs.state_dict()
        for tensor in state.values():
            if tensor.ndim == 1:                            # or no error in a bias or a scale would show
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    if "ours" in names:
        ours = load_vit(c, state, "transformers")[0] if state else VisionTransformer(c)
        FrozenBackbone(ours, c.taps, [0, 0, 0], [1, 1, 1], {}).to(device, amp_dtype if held else None)
        add("ours", lambda: [part.float().view(batch, -1, c.embed_dim) for part in ours(image).values()],
            amp_dtype)
    if "theirs" in names:
        theirs.to(device, amp_dtype if held else None)
        add("theirs", lambda: theirs(image).last_hidden_state.float().split(parts, 1), None if held else amp_dtype)
    return sides


def tensors(*modules: nn.Module) -> list[torch.Tensor]:
    return [parameter for module in modules for parameter in module.parameters()]


class TransformersHead(nn.Module):
    """Pixel decoder, transformer module, class predictor and loss of transformers, put together as it does itself."""

    def __init__(self, args, in_channels: int, hidden_dim: int):
        from transformers import Mask2FormerConfig
        from transformers.models.mask2former import modeling_mask2former as theirs
        super().__init__()
        config = Mask2FormerConfig(
            feature_size=hidden_dim, mask_feature_size=hidden_dim, hidden_dim=hidden_dim, encoder_layers=6,
            decoder_layers=10, num_attention_heads=args.num_heads, encoder_feedforward_dim=args.ffn_dim,
            dim_feedforward=args.ffn_dim, train_num_points=args.num_points, num_labels=NUM_CLASSES)
        self.pixel_decoder = theirs.Mask2FormerPixelDecoder(config, [in_channels] * 4)
        self.transformer_module = theirs.Mask2FormerTransformerModule(hidden_dim, config)
        self.class_predictor = nn.Linear(hidden_dim, NUM_CLASSES + 1)
        self.criterion = theirs.Mask2FormerLoss(config, {})
        self.weights = {"cross_entropy": config.class_weight, "mask": config.mask_weight, "dice": config.dice_weight}
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)        # level_embed is otherwise what was in memory

    @torch.no_grad()
    def load(self, head: Mask2FormerHead) -> None:
        """The weights of ours, listed in the order of theirs; that the outputs agree shows that none is exchanged."""
        pixel, decoder = head.pixel_decoder, head.predictor
        weights = [pixel.encoder.level_encoding, *tensors(pixel.input_convs)]
        for layer in pixel.encoder.encoder.layers:
            weights += tensors(layer.self_attn, layer.norm1, layer.linear1, layer.linear2, layer.norm2)
        weights += tensors(pixel.mask_feature, pixel.lateral_convs, pixel.output_convs, decoder.query_embed,
                           decoder.query_feat)
        for own, cross, ffn in zip(decoder.transformer_self_attention_layers,
                                   decoder.transformer_cross_attention_layers, decoder.transformer_ffn_layers,
                                   strict=True):
            q, k, v = zip(own.self_attn.in_proj_weight.chunk(3), own.self_attn.in_proj_bias.chunk(3), strict=True)
            weights += [*k, *v, *q, *tensors(own.self_attn.out_proj, own.norm, cross, ffn)]
        weights += tensors(decoder.post_norm, decoder.mask_embed, decoder.level_embed, decoder.class_embed)
        for mine, other in zip(self.parameters(), weights, strict=True):
            mine.copy_(other)

    def forward(self, features: dict) -> list[dict]:
        """-> all outputs, the last one last."""
        pixel = self.pixel_decoder([features[name] for name in "1234"], return_dict=True)
        decoded = self.transformer_module(pixel.multi_scale_features, pixel.mask_features, output_hidden_states=True)
        classes = [self.class_predictor(x.transpose(0, 1)) for x in decoded.intermediate_hidden_states]
        return [{"class_queries_logits": c, "masks_queries_logits": m}
                for c, m in zip(classes, decoded.masks_queries_logits, strict=True)]

    def loss(self, outputs: list[dict], masks: list[torch.Tensor], classes: list[torch.Tensor]) -> torch.Tensor:
        terms = self.criterion(**outputs[-1], mask_labels=masks, class_labels=classes,
                               auxiliary_predictions=outputs[:-1])
        return sum(weight * value for kind, weight in self.weights.items() for name, value in terms.items()
                   if name.startswith(f"loss_{kind}"))


def patches_of_classes(batch: int, size: int) -> torch.Tensor:
    """Label maps (B, size, size) int64 of PER_IMAGE classes each, in rectangles."""
    cells = torch.stack([torch.randperm(NUM_CLASSES)[:PER_IMAGE][torch.randint(PER_IMAGE, (8, 8))]
                         for _ in range(batch)])
    return nn.functional.interpolate(cells[:, None].float(), size=(size, size), mode="nearest").long()[:, 0]


def m2f_sides(args, size: int, batch: int, number: str, names) -> dict:
    """A training step without the optimiser's: pixel decoder (6 layers, 3 levels, 4 points), transformer decoder (9
    layers, 100 queries), matching and losses of 10 outputs, gradients of all parameters and of the feature maps, in
    float32. The dense masks that theirs wants are made beforehand; ours reads the label map. Random points differ."""
    channels, device = BACKBONES[args.backbone[0]].embed_dim, pick_device(args.device or "cpu")
    torch.manual_seed(0)
    hidden_dim, sides = args.hidden_dim or 256, {}
    features = {str(i): torch.randn(batch, channels, size // 2 ** (i + 1), size // 2 ** (i + 1), device=device)
                .requires_grad_() for i in range(1, 5)}
    label = patches_of_classes(batch, size).to(device)
    leaves = list(features.values())

    def finish(model, loss, logits, masks):
        gradient = torch.autograd.grad(loss, [*model.parameters(), *leaves])
        assert all(part.isfinite().all() for part in gradient[-4:]), "gradient of the maps"
        return [torch.stack([part.detach() for part in parts]) for parts in (logits, masks)] + [loss.detach()]

    if "ours" in names:
        head = Mask2FormerHead(channels, NUM_CLASSES, hidden_dim, num_heads=args.num_heads, ffn_dim=args.ffn_dim)
        head, criterion = head.to(device).train(), SetCriterion(NUM_CLASSES, args.num_points).to(device)

        def our_step():
            outputs = head(features)
            every = [*outputs["aux_outputs"], outputs]
            return finish(head, criterion(outputs, label)["total"], [one["pred_logits"] for one in every],
                          [one["pred_masks"] for one in every])
        sides["ours"] = our_step
    if "theirs" in names:
        theirs = TransformersHead(args, channels, hidden_dim)
        if "ours" in names:
            theirs.load(head)
        theirs.to(device).train()
        classes = [part.unique() for part in label]
        masks = [(part == ids[:, None, None]).float() for part, ids in zip(label, classes, strict=True)]

        def their_step():
            outputs = theirs(features)
            return finish(theirs, theirs.loss(outputs, masks, classes),
                          [one["class_queries_logits"] for one in outputs],
                          [one["masks_queries_logits"] for one in outputs])
        sides["theirs"] = their_step
    return sides


def vit(args) -> list[dict]:
    print(f"Forward pass of {args.backbone[0]}", flush=True)
    return compare(args, "vit", vit_sides, args.formats, "the tokens")


def m2f(args) -> list[dict]:
    print(f"Training step of the Mask2Former head on maps of {BACKBONES[args.backbone[0]].embed_dim} channels, "
          f"{args.num_heads} heads, feed-forward {args.ffn_dim}", flush=True)
    return compare(args, "m2f", m2f_sides, ["float32"], "class logits, mask logits, loss")


# -- epochs with cached features ---------------------------------------------------------------------------------------

def cache(args) -> list[dict]:
    """The scripts on made-up pictures, the same views each epoch: time of their train_one_epoch without the first."""
    device, rows = pick_device(args.device or "cpu"), []
    scripts = [SCRIPTS[name] for name in args.scripts]
    for script, (size, batch) in itertools.product(scripts, args.shapes):
        with tempfile.TemporaryDirectory() as folder:
            make_image_set(folder, 2 * batch, 0, 0, size=(size * 4 // 3, size))             # two windows a picture
            found, common = [], (
                f"--num-classes {len(IMAGE_CLASSES)} --image-size {size} --batch-size {batch} --augment windows "
                f"--backbone {args.backbone[0]} --backbone-weights random --epochs {args.repeats + 1} --num-workers 0 "
                f"--device {device}")
            if args.hidden_dim and script is not train_linear_head:
                common += f" --hidden-dim {args.hidden_dim}"
            for flags in ([], ["--cache-features"]):
                times, output = [], f"{folder}/run{len(flags)}"
                with mock.patch.object(script, "train_one_epoch", timed(script.train_one_epoch, times, device)):
                    script.main([
                        "--image-paths", f"{folder}/images/train", "--mask-paths", f"{folder}/masks/train",
                        "--output-dir", output, "--cache-dir", f"{folder}/cache", *flags, *common.split(),
                        *(f"--num-points {args.num_points} --ffn-dim {args.ffn_dim}".split()
                          if script is train_m2f_head else [])])
                found.append((statistics.median(times[1:]), [r["loss"] for r in read_log(f"{output}/log/log.jsonl")]))
        (slow, losses), (fast, same) = found
        rows.append({"script": script.SCRIPT, "ratio": slow / fast,
                     "difference": max(abs(a - b) / abs(a) for a, b in zip(losses, same, strict=True))})
        print(f"{script.SCRIPT}, {args.backbone[0]}, {size} px, batch {batch}: an epoch {slow:.2f} s, with "
              f"--cache-features {fast:.2f} s: {slow / fast:.2f} x; largest relative difference of an epoch's loss "
              f"{rows[-1]['difference']:.1e}\n", flush=True)
    return rows


def timed(function, times: list[float], device: torch.device):
    def call(*arguments):
        start = clock(device)
        result = function(*arguments)
        times.append(clock(device) - start)
        return result
    return call


# -- whole steps -------------------------------------------------------------------------------------------------------

def backbone_flops(config: ViTConfig, size: int) -> int:
    """Multiplications and additions of the matrix products for one image: patch embedding, and in each block qkv and
    output projection, attention, feed-forward."""
    patches = (size // config.patch_size) ** 2
    tokens, dim = patches + 1 + config.num_registers, config.embed_dim
    matrices = 4 * dim ** 2 + (2 if config.ffn == "mlp" else 3) * dim * config.ffn_hidden
    return 2 * patches * 3 * config.patch_size ** 2 * dim + config.depth * tokens * (2 * matrices + 4 * tokens * dim)


def whole_steps(args, name: str, size: int, batch: int, device: torch.device) -> dict:
    config, dtype = BACKBONES[name], torch.bfloat16
    hidden_dim = args.hidden_dim or (2048 if name == "dinov3_vit7b16" else 256)
    torch.manual_seed(0)
    with torch.device(device):
        backbone = FrozenBackbone(VisionTransformer(config), config.taps, [0.5] * 3, [0.25] * 3, {})
        adapter = DINOv3_Adapter(config.embed_dim, config.patch_size,
                                 gradient_checkpointing=args.gradient_checkpointing)
        head = Mask2FormerHead(config.embed_dim, NUM_CLASSES, hidden_dim, num_heads=args.num_heads,
                               ffn_dim=args.ffn_dim, gradient_checkpointing=args.gradient_checkpointing)
    backbone._sha256 = "random"                             # 27 GB need not be hashed
    backbone.to(device, dtype)
    model, criterion = Mask2FormerSegmenter(adapter, head), SetCriterion(NUM_CLASSES, args.num_points).to(device)
    model.backbone = backbone
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    data = {"image": torch.randint(256, (batch, 3, size, size), dtype=torch.uint8).to(device),
            "label": patches_of_classes(batch, size).to(device)}

    def step():
        image, taps, label = prepare(data, backbone, device)
        with autocast(device, dtype):
            outputs = model(image, taps)
        criterion(outputs, label)["total"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def predict():
        with autocast(device, dtype):
            model.scores(backbone.normalize(data["image"])).argmax(1)

    seconds, peak = {}, {}
    for kind, function in (("backbone", lambda: backbone(backbone.normalize(data["image"]))),
                           ("forward", predict), ("step", step)):
        model.train(kind == "step")
        peak_mib(device, reset=True)
        seconds[kind] = statistics.median(by_turns({kind: function}, args.repeats, device)[kind])
        peak[kind] = peak_mib(device) / 1024
    tflops = backbone_flops(config, size) * batch / seconds["backbone"] / 1e12
    row = {"forward": batch / seconds["forward"], "step": batch / seconds["step"], "peak": peak,
           "share": seconds["backbone"] / seconds["step"], "mfu": tflops / args.peak_tflops}
    print(f"  {name}, {size} px, batch {batch}, hidden {hidden_dim}: forward {row['forward']:.2f} images/s "
          f"({peak['forward']:.1f} GiB), training {row['step']:.2f} images/s ({peak['step']:.1f} GiB), of which the "
          f"backbone {100 * row['share']:.0f} %: {tflops:.1f} TFLOP/s, {100 * row['mfu']:.1f} % of "
          f"{args.peak_tflops:g}", flush=True)
    return row


def gpu(args) -> list[dict]:
    device, rows = pick_device(args.device or "cuda"), []
    print(f"Forward and training step in bfloat16, Mask2Former on a frozen backbone, {describe(device)}", flush=True)
    for name, (size, batch) in itertools.product(args.backbone, args.shapes):
        try:
            rows.append(whole_steps(args, name, size, batch, device))
        except torch.OutOfMemoryError:
            print(f"  {name}, {size} px, batch {batch}: out of memory", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.part != "all":
        return {"vit": vit, "m2f": m2f, "cache": cache, "gpu": gpu, "memory": memory}[args.part](args)
    argv = sys.argv[1:] if argv is None else argv
    for part in SHAPES:
        if part != "gpu" or torch.cuda.is_available():
            subprocess.run([sys.executable, __file__, *[part if word == "all" else word for word in argv]], check=False)


if __name__ == "__main__":
    run_main(main)
