"""A GPU that is not there: on a build of PyTorch for the CPU, tensors say cuda:0 or mps:0, and their values lie in host memory.

    python -m tests.fake_device train_segmentation.py CONFIG ... --device cuda          # a script of this folder on the small networks
    FAKE_DEVICE=mps python -m tests.fake_device train_jepa.py ... // predict.py ...     # as Apple's, several scripts after one another

    from tests.fake_device import fake_device                                           # before torch, which must not be imported yet
    with fake_device(): model.to("cuda") ...

It fails where the device would: CPU tensors beside the device's, a CPU generator for it, .numpy(), indices of another device,
more than 65,535 sequences of attention, float64 as MPS refuses it, and under torch.use_deterministic_algorithms what CUDA has no
deterministic kernel for. autocast takes the device's lists. Everything that waits for the device is counted, by the line that asked
for it: copies to the host, copies to the device that are not non_blocking, .item(), nonzero, masks as indices, unique, bincount ...

It cannot show: kernels and their rounding, speed, memory, streams, pinned memory, dtypes that only a GPU refuses, nccl, several
processes, torch.compile. Random numbers come from the CPU's generator.

How: a tensor of the device is a subclass (FakeTensor) that holds a CPU tensor; below autograd and autocast every operation comes to
`dispatch`, which checks its arguments, runs it on the CPU tensors and wraps the results. PyTorch wants a device guard and hooks
for a device it was built without; fake_device.cpp has both, compiled by g++ at first use (20 s).

Environment: FAKE_DEVICE cuda (default) or mps. FAKE_DEVICE_REPORT a file: a JSON line for each script that ended (see `report`).
"""

import collections
import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KIND = os.environ.get("FAKE_DEVICE", "cuda")


def build_guard(kind: str) -> Path:
    """The compiled fake_device.cpp, made where it is not there yet; in .cache, by what it depends on."""
    source, torch_folder = Path(__file__).with_suffix(".cpp"), Path(importlib.util.find_spec("torch").origin).parent
    version = (torch_folder / "version.py").read_bytes()
    key = hashlib.sha256(source.read_bytes() + version).hexdigest()[:16]
    library = ROOT / ".cache" / "fake_device" / f"{kind}-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    include = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    subprocess.run(["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-DFAKE_{kind.upper()}", *include, str(source), "-o", str(part),
                    f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib", "-Wl,--no-as-needed"], check=True)
    part.replace(library)
    return library


# PyTorch asks for guard and hooks once, while it is imported.
assert "torch" not in sys.modules, "import tests.fake_device before torch"
ctypes.CDLL(str(build_guard(KIND)))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  before anything is patched
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402
from torch.utils import _foreach_utils  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map  # noqa: E402

DEVICE = torch.device(KIND, 0)
CPU = torch.device("cpu")
WAITS: collections.Counter = collections.Counter()       # "what at file:line": how often the host waited for the device
AT_STEPS: list[int] = []                                 # sum of WAITS when an optimiser stepped
MAX_SEQUENCES = 65_535

# Pointwise operations take CPU tensors without dimensions beside the device's; these do not.
NO_SCALAR = {"mm", "bmm", "addmm", "cat", "stack", "index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add",
             "convolution", "native_layer_norm", "native_batch_norm", "embedding", "nll_loss_forward", "nll_loss2d_forward",
             "searchsorted", "bincount", "index_copy", "index_fill", "dot", "mv", "grid_sampler_2d"}
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Results whose size or value the host has to know.
WAITING = {"_local_scalar_dense", "nonzero", "unique2", "_unique2", "unique_dim", "masked_select", "equal", "bincount",
           "unique_consecutive", "repeat_interleave", "_linalg_check_errors", "_linalg_eigh"}
# What torch.use_deterministic_algorithms.__doc__ says raises on CUDA.
NONDETERMINISTIC = {"avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "upsample_linear1d_backward",
                    "upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward", "upsample_bicubic2d_backward",
                    "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward", "reflection_pad2d_backward",
                    "histc", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "put_", "median", "kthvalue"}


class DeviceMismatch(RuntimeError):
    """What CUDA says as 'Expected all tensors to be on the same device'."""


class FakeTensor(torch.Tensor):
    """A tensor of the device. elem: its values, a CPU tensor."""

    @staticmethod
    def __new__(cls, elem, requires_grad=False):
        assert type(elem) is not FakeTensor and elem.device.type == "cpu", elem
        if KIND == "mps" and elem.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                            f"Please use float32 instead. (at {place()})")
        elem = elem.detach()
        meta = torch.empty_strided(elem.shape, elem.stride(), dtype=elem.dtype, device="meta")
        self = torch.Tensor._make_subclass(cls, meta, requires_grad, dispatch_device=True, device_for_backend_keys=DEVICE)
        self.elem = elem
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        note("tolist")
        return self.elem.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() (at {place()})")

    __array__ = numpy

    def __repr__(self):
        return f"FakeTensor({self.elem!r})"

    def __deepcopy__(self, memo):
        copy = FakeTensor(self.elem.clone(), False)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        copy.requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol):
        return self.elem.__reduce_ex__(protocol)


def place() -> str:
    """The line of the project that asked."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        if frame.filename.startswith(str(ROOT)) and frame.filename != __file__:
            return f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno}"
    return "backward or library"


def note(what: str) -> None:
    WAITS[f"{what} at {place()}"] += 1


def plain(value):
    """The CPU tensor inside."""
    return value.elem if isinstance(value, FakeTensor) else value


def dispatch(func, args, kwargs):
    """An operation, below autograd and autocast."""
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
    if func is torch.ops.prim.device.default:
        return DEVICE if isinstance(args[0], FakeTensor) else args[0].device
    flat, _ = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, FakeTensor)]
    theirs = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) and x.device.type != "meta"]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not ours and not (wanted is not None and wanted.type == KIND):
        return func(*args, **kwargs)
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in flat):
        raise DeviceMismatch(f"{func}: Expected a '{KIND}' device type for generator but found 'cpu' (at {place()})")
    count_waits(name, args, kwargs)
    if KIND == "cuda" and torch.are_deterministic_algorithms_enabled():
        refuse_nondeterministic(name, args, kwargs)
    if name == "is_pinned":
        return False
    call_args, call_kwargs = tree_map(plain, args), tree_map(plain, kwargs)
    if wanted is not None:
        call_kwargs["device"] = CPU
    if name == "_to_copy":
        on_device = bool(ours) if wanted is None else wanted.type == KIND
        if bool(ours) != on_device:
            count_copy(on_device, kwargs.get("non_blocking", False))
        call_kwargs.pop("pin_memory", None)
        call_kwargs["non_blocking"] = False
        out = func(*call_args, **call_kwargs)
        return FakeTensor(out) if on_device else out
    if name == "copy_":
        func(*call_args, **call_kwargs)
        if isinstance(args[0], FakeTensor) != isinstance(args[1], FakeTensor):
            count_copy(isinstance(args[0], FakeTensor), args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return args[0]
    check_devices(func, name, args, ours, theirs)
    on_device = bool(ours) if wanted is None else wanted.type == KIND
    shapes = [x.elem.shape for x in ours]
    out = func(*call_args, **call_kwargs)
    if [x.elem.shape for x in ours] != shapes:
        raise NotImplementedError(f"fake_device: {func} changes the shape in place")
    known = {id(x.elem): x for x in ours} | {id(x): x for x in theirs}

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in known:
            return known[id(x)]
        return FakeTensor(x) if on_device and not isinstance(x, FakeTensor) else x
    return tree_map(wrap, out)


def count_copy(to_device: bool, non_blocking: bool) -> None:
    if not to_device:
        note("device to host")
    elif not non_blocking:
        note("host to device, not non_blocking")


def count_waits(name: str, args, kwargs) -> None:
    if name in WAITING and kwargs.get("output_size") is None:        # which repeat_interleave may be given
        note(name)
    if name in INDEX and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1] if x is not None):
        fills = name != "index" and len(args) > 2 and isinstance(args[2], torch.Tensor) and args[2].numel() == 1
        if not fills:                                                # which masked_fill does
            note("mask as index")


def refuse_nondeterministic(name: str, args, kwargs) -> None:
    weighted = name == "bincount" and (args[1] if len(args) > 1 else kwargs.get("weights")) is not None
    mean_of_images = name == "nll_loss2d_forward" and args[3] != 0   # reduction "none" is allowed
    if name in NONDETERMINISTIC or weighted or mean_of_images or (name == "cumsum" and args[0].is_floating_point()):
        raise RuntimeError(f"{name}_cuda does not have a deterministic implementation, but you set "
                           f"'torch.use_deterministic_algorithms(True)' (at {place()})")


def check_devices(func, name: str, args, ours: list, theirs: list) -> None:
    if not ours or not theirs:
        return
    where = f"{func} at {place()}"
    if name in INDEX:                                                # CPU indices are allowed, and copied
        if not isinstance(args[0], FakeTensor):
            raise DeviceMismatch(f"{where}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if name != "index" and len(args) > 2 and isinstance(args[2], torch.Tensor) and not isinstance(args[2], FakeTensor) and args[2].ndim:
            raise DeviceMismatch(f"{where}: values on cpu")
        if any(isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) for x in args[1]):
            note("CPU index")
        return
    for argument, value in zip(func._schema.arguments, args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            raise DeviceMismatch(f"{where}: writes into a CPU tensor from {KIND} ones")
    large = [tuple(x.shape) for x in theirs if x.ndim]
    many = name.startswith(("_foreach", "_fused", "_amp"))
    if large or (name.rstrip("_") in NO_SCALAR and not many):
        raise DeviceMismatch(f"{where}: Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
                             f"CPU: {large or 'scalars'}")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def cuda_patches() -> dict:
    """Names of torch.cuda, and what they are inside fake_device."""
    state = torch.zeros(16, dtype=torch.uint8)
    properties = types.SimpleNamespace(name="Make-believe GPU", total_memory=80 * 2**30, major=9, minor=0, multi_processor_count=100)
    return {"_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1, "is_initialized": lambda: True,
            "get_device_properties": lambda device=None: properties, "get_device_name": lambda device=None: properties.name,
            "is_bf16_supported": lambda including_emulation=True: True, "current_device": lambda: 0,
            "get_rng_state_all": lambda: [state.clone()], "set_rng_state": lambda state, device=0: None,
            "get_rng_state": lambda device=0: state.clone(), "synchronize": lambda device=None: note("synchronize"),
            "set_device": lambda device: None, "device": lambda device: contextlib.nullcontext(),
            "get_device_capability": lambda device=None: (9, 0), "empty_cache": lambda: None}


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention: refuses what CUDA's kernels refuse. PyTorch's own would look for a kernel of MPS, and stop."""
    if KIND == "cuda" and query.device.type == KIND and query.shape[0] > MAX_SEQUENCES:
        raise RuntimeError(f"CUDA error: invalid configuration argument: {query.shape[0]} sequences (at {place()})")
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                                             enable_gqa=enable_gqa)[0]


@contextlib.contextmanager
def fake_device() -> Iterator[None]:
    """Inside, PyTorch says that there is a device, and tensors made there are FakeTensors."""
    undo = []

    def patch(owner, name, value):
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    if KIND == "cuda":
        for name, value in cuda_patches().items():
            patch(torch.cuda, name, value)
        patch(torch.Tensor, "cuda", lambda self, *args, **kwargs: self.to(DEVICE))
    else:
        patch(torch.backends.mps, "is_available", lambda: True)
        patch(torch.mps, "manual_seed", lambda seed: None)
    patch(torch.nn.functional, "scaled_dot_product_attention", attention)
    kept = torch._has_compatible_shallow_copy_type                   # whether Module.to may change a parameter in place
    patch(torch, "_has_compatible_shallow_copy_type", lambda a, b: isinstance(a, FakeTensor) == isinstance(b, FakeTensor) and kept(a, b))
    patch(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    import utils.checkpoint as checkpoint
    to_plain = checkpoint._plain                                     # takes plain tensors alone; torch.save copies from the device
    patch(checkpoint, "_plain", lambda value, where="": to_plain(tree_map(plain, value) if where == "" else value, where))
    _foreach_utils._foreach_supported_types.append(FakeTensor)       # as optimisers do on a GPU
    hook = register_optimizer_step_post_hook(lambda *_: AT_STEPS.append(sum(WAITS.values())))
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    cudnn = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        with _Mode():
            yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        torch._C._set_only_lift_cpu_tensors(lift)
        hook.remove()
        _foreach_utils._foreach_supported_types.remove(FakeTensor)
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def report() -> dict:
    """waits: {what at file:line: times}, most frequent first. per_step: waits from each optimiser step to the next. Both start again."""
    found = {"waits": dict(WAITS.most_common()), "per_step": [after - before for before, after in zip(AT_STEPS[:-1], AT_STEPS[1:], strict=True)]}
    WAITS.clear()
    AT_STEPS.clear()
    return found


def main(words: list[str]) -> None:
    from tests.tiny_runs import shrink
    shrink()
    while words:
        end = words.index("//") if "//" in words else len(words)
        sys.argv, words = words[:end], words[end + 1:]
        module = importlib.import_module(Path(sys.argv[0]).stem)
        with fake_device():
            module.main(sys.argv[1:])
        found = {"script": sys.argv[0], **report()}
        if path := os.environ.get("FAKE_DEVICE_REPORT"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
        else:
            print(f"-- {sum(found['waits'].values())} waits; from step to step {found['per_step']}",
                  *(f"{count:6} {what}" for what, count in found["waits"].items()), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
