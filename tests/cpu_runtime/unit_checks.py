# SPDX-License-Identifier: Apache-2.0
"""One check a unit of the CPU runtime: passes with all units applied, fails without that one."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable
from typing import Any

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@check
def factories() -> None:
    import torch

    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device=0, pin_memory=True).device.type == "cpu"
    assert torch.zeros(2).new_ones(3, device=torch.device("cuda", 1)).device.type == "cpu"
    with torch.device("meta"):
        assert torch.ones(2).device.type == "meta"


@check
def device_context() -> None:
    import torch

    with torch.device("cuda"):
        assert torch.zeros(2).device.type == "cpu"
        assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


@check
def tensor_to() -> None:
    import torch

    assert torch.zeros(1).to("cuda").device.type == "cpu"
    assert torch.zeros(1).to(device=0, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert torch.zeros(1).to(torch.float64).dtype is torch.float64
    assert torch.nn.Linear(2, 2).to("cuda:0").weight.device.type == "cpu"


@check
def tensor_cuda() -> None:
    import torch

    tensor = torch.zeros(1)
    assert tensor.cuda() is tensor
    assert tensor.cuda(0, non_blocking=True) is tensor
    assert torch.nn.Linear(2, 2).cuda(0).weight.device.type == "cpu"


@check
def tensor_type() -> None:
    import torch

    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type("torch.cuda.HalfTensor").dtype is torch.float16
    assert torch.zeros(1).type(torch.int64).dtype is torch.int64


@check
def pinned_memory() -> None:
    import torch

    tensor = torch.zeros(1)
    assert tensor.pin_memory() is tensor
    assert not tensor.is_pinned()
    tensor.record_stream(torch.cuda.current_stream())


@check
def torch_load() -> None:
    import torch

    file = io.BytesIO()
    torch.save(torch.arange(3), file)
    file.seek(0)
    assert torch.load(file, map_location="cuda:0").tolist() == [0, 1, 2]


@check
def cuda_presence() -> None:
    import torch

    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.current_device() == 0
    assert torch.cuda.get_device_properties(0).major == 8
    assert "CPU" in torch.cuda.get_device_name()
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        called = []
        torch.cuda._lazy_call(lambda: called.append(True))
        assert called


@check
def no_accelerator() -> None:
    import torch

    assert not torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() is None
    assert torch.accelerator.device_count() == 0


@check
def nvtx_ranges() -> None:
    import torch

    class AsWithoutCuda:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("NVTX functions not installed")

    torch.cuda.nvtx._nvtx = AsWithoutCuda()
    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.range_pop()


@check
def power_readings() -> None:
    import torch

    assert torch.cuda.temperature() == torch.cuda.power_draw() == torch.cuda.utilization() == 0


@check
def streams() -> None:
    import torch

    side = torch.cuda.Stream()
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() is side
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    side.wait_stream(torch.cuda.current_stream())
    side.record_event(end)
    end.synchronize()
    assert 0 <= start.elapsed_time(end) < 60_000


@check
def memory_numbers() -> None:
    import torch

    before = torch.cuda.max_memory_allocated()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    grown = torch.cuda.max_memory_allocated() - before
    assert before > 16 << 20, "an interpreter with torch takes more"
    assert grown >= 48 << 20, grown
    assert torch.cuda.memory_allocated() <= torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()
    assert 0 <= free <= total
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] >= before
    del block


@check
def cuda_generator() -> None:
    import torch

    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), first)
    assert torch.cuda.default_generators[0] is torch.default_generator


@check
def dataloader_seed() -> None:
    import torch

    state = torch.get_rng_state()
    assert len(list(torch.utils.data.DataLoader([1, 2, 3]))) == 3
    assert torch.equal(torch.get_rng_state(), state)


def _world_of_one(backend: str) -> Any:
    import tempfile

    import torch

    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group(
        backend, store=torch.distributed.FileStore(f"{folder}/store", 1), rank=0, world_size=1
    )
    return torch.distributed


@check
def gloo_for_nccl() -> None:
    dist = _world_of_one("nccl")
    assert dist.get_backend() == "gloo"
    assert dist.get_backend(dist.new_group([0], backend="nccl")) == "gloo"
    assert dist.get_backend(dist.new_group([0], backend="cpu:gloo,cuda:nccl")) == "gloo"
    dist.destroy_process_group()


@check
def fused_adam() -> None:
    import torch
    from apex.optimizers import FusedAdam

    for decoupled, reference in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
        torch.manual_seed(0)
        ours = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
        theirs = torch.nn.Parameter(ours.detach().clone())
        settings = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.9)}
        optimizers = (
            FusedAdam([ours], adam_w_mode=decoupled, **settings),
            reference([theirs], **settings),
        )
        for _ in range(5):
            gradient = torch.randn(5, dtype=torch.float64)
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert optimizers[0].param_groups[0]["step"] == 5
        assert sorted(optimizers[0].state[ours]) == ["exp_avg", "exp_avg_sq"]


@check
def torch_norm_under_tp_sp() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    for tp_sp in (True, False):
        config = types.SimpleNamespace(
            layernorm_zero_centered_gamma=False,
            persist_layer_norm=True,
            sequence_parallel=tp_sp,
            memory_efficient_layer_norm=False,
            normalization="RMSNorm",
        )
        norm = WrappedTorchNorm(config, 8, 1e-5)
        assert [p.sequence_parallel for p in norm.parameters()] == [tp_sp]


@check
def no_jit_warmup() -> None:
    import torch
    from megatron.training import initialize

    state = torch.get_rng_state()
    initialize._warmup_jit_function()
    assert torch.equal(torch.get_rng_state(), state)


@check
def outputs_in_flight() -> None:
    from megatron.core.pipeline_parallel import schedules

    config = types.SimpleNamespace(deallocate_pipeline_outputs=True)
    chunks = [types.SimpleNamespace(config=config)] * 2
    with contextlib.suppress(AssertionError, AttributeError, TypeError):  # nothing to train
        schedules.forward_backward_pipelining_with_interleaving(
            forward_step_func=None,
            data_iterator=[None, None],
            model=chunks,
            num_microbatches=2,
            seq_length=2,
            micro_batch_size=1,
        )
    assert not config.deallocate_pipeline_outputs


@check
def names_of_absent_engine() -> None:
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    assert not isinstance(None, multi_latent_attention.TELinear)
    assert moe_utils.te_general_gemm is None


@check
def moe_split_sizes() -> None:
    import numpy
    import torch
    from megatron.core.transformer.moe.moe_utils import maybe_move_tensor_to_cpu

    sizes = torch.tensor([3, 1])
    moved = maybe_move_tensor_to_cpu(sizes, as_numpy=True)
    assert isinstance(moved, numpy.ndarray)
    assert maybe_move_tensor_to_cpu(moved, as_numpy=True) is moved
    assert maybe_move_tensor_to_cpu(sizes) is sizes
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def _raise(*args: Any) -> None:
    raise FileNotFoundError("nvcc")


@check
def no_legacy_kernels() -> None:
    sys.modules["megatron.legacy.fused_kernels"].load(None)


@check
def triton_stub() -> None:
    import triton
    import triton.language as tl
    from torch.utils._triton import has_triton_package

    @triton.jit
    def kernel() -> int:
        return 7

    assert kernel() == 7
    assert triton.language is tl
    assert not tl.constexpr(True)
    assert not has_triton_package()


@check
def cpu_flags() -> None:
    from megatron.training import arguments

    sys.argv = ["script.py", "--micro-batch-size", "3"]
    parsed = arguments.parse_args()
    assert parsed.micro_batch_size == 3
    assert parsed.transformer_impl == "local"
    assert parsed.distributed_backend == "gloo"
    assert not parsed.gradient_accumulation_fusion


@check
def hybrid_layers() -> None:
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as spec
    except ModuleNotFoundError:  # before megatron-core 0.18
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    attention = spec.submodules.attention_layer.submodules.self_attention
    assert attention.submodules.linear_qkv is ColumnParallelLinear


@check
def hybrid_final_norm() -> None:
    try:
        from megatron.core.models.hybrid import hybrid_block as block
    except ImportError:  # before megatron-core 0.18
        from megatron.core.ssm import mamba_block as block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    assert block.TENorm is WrappedTorchNorm


def _stand_ins() -> None:
    """What this machine has or lacks differently from those that a unit is for."""
    legacy = types.ModuleType("megatron.legacy.fused_kernels")
    legacy.load = _raise  # type: ignore[attr-defined]
    sys.modules[legacy.__name__] = legacy
    # as in megatron-core 0.16 without Transformer Engine
    from megatron.core import package_info

    package_info.__version__ = "0.16.1"
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    multi_latent_attention.TELinear = None
    vars(moe_utils).pop("te_general_gemm", None)
    from torch.utils._triton import has_triton_package

    has_triton_package.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        del sys.modules[name]
    find = importlib.util.find_spec
    importlib.util.find_spec = (  # type: ignore[assignment]
        lambda name, package=None: None if name == "triton" else find(name, package)
    )
    sys.meta_path.insert(0, _NoTriton())


class _NoTriton:
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {fullname!r}")


def run_check(name: str, leave_out: str | None) -> None:
    """Apply every unit but `leave_out`, as activate() does, and run the check of `name`."""
    from megatron_seqpar import cpu_runtime

    _stand_ins()
    for unit_name, each in cpu_runtime.units().items():
        if unit_name != leave_out:
            each.apply()
    CHECKS[name]()
