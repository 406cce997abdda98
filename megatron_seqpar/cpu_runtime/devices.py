# SPDX-License-Identifier: Apache-2.0
"""CUDA device names mean the CPU, wherever torch takes a device."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .registry import replace, unit

CPU = torch.device("cpu")

# fmt: off
FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full",
    "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range",
    "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    "empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like",
    "sparse_coo_tensor", "sparse_csr_tensor",
    "hann_window", "hamming_window", "bartlett_window", "blackman_window",
)
METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
# fmt: on


def to_cpu(device: Any) -> Any:
    """The CPU for whatever names a CUDA device ('cuda', 'cuda:1', a device, an int); else as is."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.split(":")[0] == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    return device


def _on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


@unit
def factories() -> None:
    """Tensor factories take device='cuda' or an int; without a driver torch raises.

    torch keeps the list of its own factories in a cache that `with torch.device(...)` looks
    functions up in: it must be filled before they are wrapped.

    Serves: core/optimizer/clip_grads.py (device='cuda'), core/timers.py, core/utils.py,
    core/tensor_parallel/layers.py (device=torch.cuda.current_device(), an int).
    """
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in FACTORIES:
        replace(torch, **{name: _on_cpu(getattr(torch, name))})
    for name in METHODS:
        replace(torch.Tensor, **{name: _on_cpu(getattr(torch.Tensor, name))})


@unit
def device_context() -> None:
    """`with torch.device('cuda'):` adds the device below the wrapped factories.

    Serves: core/models/common/embeddings/yarn_rotary_pos_embedding.py (`with torch.device(device)`)
    and scripts that build a model under `with torch.device("cuda")`.
    """
    from torch.utils._device import DeviceContext

    original = DeviceContext.__init__

    @functools.wraps(original)
    def __init__(self: Any, device: Any) -> None:
        original(self, to_cpu(device))

    replace(DeviceContext, __init__=__init__)


@unit
def tensor_to() -> None:
    """`tensor.to('cuda')` and `module.to(0)` stay where they are.

    Serves: training/training.py, core/dist_checkpointing (`.to(device)` of loaded tensors).
    """
    original = torch.Tensor.to

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (str, int, torch.device)):
            args = (to_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        return original(self, *args, **kwargs)

    replace(torch.Tensor, to=to)


@unit
def tensor_cuda() -> None:
    """`tensor.cuda()` is the tensor itself, as it is for a tensor that is on the GPU already.

    Serves: training/models/dist_utils.py (`model.cuda(torch.cuda.current_device())`),
    core/models/common/language_module/language_module.py, pretrain_gpt.py `get_batch`.
    """

    def cuda(
        self: Any, device: Any = None, non_blocking: bool = False, memory_format: Any = None
    ) -> Any:
        return self if memory_format is None else self.to(memory_format=memory_format)

    replace(torch.Tensor, cuda=cuda)


@unit
def tensor_type() -> None:
    """Optimizers compare `tensor.type()` with 'torch.cuda.FloatTensor': say that for CPU tensors.

    Serves: core/optimizer/distrib_optimizer.py, core/optimizer/optimizer.py (fp32 and 16-bit
    parameter groups), core/optimizer/clip_grads.py (assertion on gradients).
    """
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and not kwargs:
            name = original(self)
            on_cpu = self.device.type == "cpu"
            return name.replace("torch.", "torch.cuda.", 1) if on_cpu else name
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    replace(torch.Tensor, type=type_)


@unit
def pinned_memory() -> None:
    """Page-locking asks the CUDA driver; host memory that is never copied to a GPU needs none.

    Serves: core/distributed/param_and_grad_buffer.py (`.cpu().pin_memory()`),
    core/pipeline_parallel/combined_1f1b.py (`record_stream`), core/pipeline_parallel/utils.py.
    """

    def pin_memory(self: Any, device: Any = None) -> Any:
        return self

    def is_pinned(self: Any, device: Any = None) -> bool:
        return False

    def record_stream(self: Any, stream: Any) -> None:
        return None

    replace(torch.Tensor, pin_memory=pin_memory, is_pinned=is_pinned, record_stream=record_stream)


@unit
def torch_load() -> None:
    """`torch.load(..., map_location='cuda')` maps to the CPU.

    Serves: core/extensions/transformer_engine.py (`map_location="cuda"`) and scripts that load a
    checkpoint written on a GPU.
    """
    original = torch.load

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(map_location, (str, torch.device)):
            map_location = to_cpu(map_location)
        return original(f, map_location, *args, **kwargs)

    replace(torch, load=load)
