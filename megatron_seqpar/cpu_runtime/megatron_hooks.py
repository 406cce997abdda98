# SPDX-License-Identifier: Apache-2.0
"""The few places of Megatron itself that need a word, said right after their module is imported."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any

from megatron_seqpar.compatibility import before, family

from .arguments import cpu_arguments
from .import_hooks import after_import
from .registry import replace, unit

_ON_CPU = (
    "megatron_seqpar: no GPU, so this runs on the CPU with gloo; memory figures are the process's "
    "resident memory; flags added:"
)


@unit
def torch_norm_under_tp_sp() -> None:
    """Without TE and apex the norm is torch's, which refuses --sequence-parallel (TP-SP).

    All it lacks is the mark on its parameters that makes their gradients be summed over the TP
    group; the mark is set here. `persist_layer_norm` names a kernel, not a result: ignored.

    Serves: core/transformer/torch_norm.py (`WrappedTorchNorm.__new__`),
    core/distributed/finalize_model_grads.py (reads `parameter.sequence_parallel`).
    """

    def hook(module: types.ModuleType) -> None:
        cls: Any = module.WrappedTorchNorm
        original = cls.__new__

        @functools.wraps(original)
        def __new__(
            cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any
        ) -> Any:
            plain = types.SimpleNamespace(
                layernorm_zero_centered_gamma=config.layernorm_zero_centered_gamma,
                persist_layer_norm=False,
                sequence_parallel=False,
                memory_efficient_layer_norm=False,
                normalization=config.normalization,
            )
            norm = original(cls, plain, hidden_size, eps, **kwargs)
            for parameter in norm.parameters():
                parameter.sequence_parallel = config.sequence_parallel
            return norm

        replace(cls, __new__=__new__)

    after_import("megatron.core.transformer.torch_norm", hook)


@unit
def no_jit_warmup() -> None:
    """The warm-up draws random tensors whose shape depends on the CP size.

    On a GPU they come from the CUDA generator and leave the CPU's alone; here the two are one, and
    models that differ in SP or CP size would start from different weights. Nothing is compiled on
    this path, so there is nothing to warm up.

    Serves: training/initialize.py (`set_jit_fusion_options` -> `_warmup_jit_function`).
    """

    def hook(module: types.ModuleType) -> None:
        replace(module, _warmup_jit_function=lambda *args, **kwargs: None)

    after_import("megatron.training.initialize", hook)


@unit
def no_legacy_kernels() -> None:
    """megatron-core 0.16 asks nvcc for its version before it builds nothing.

    Serves: megatron/legacy/fused_kernels (0.16 only; later versions have no such module).
    """

    def hook(module: types.ModuleType) -> None:
        replace(module, load=lambda args: None)

    after_import("megatron.legacy.fused_kernels", hook)


@unit
def outputs_in_flight() -> None:
    """Before 0.18 an interleaved pipeline frees a stage's output while it is still being sent.

    NCCL keeps the memory until it has been read; gloo does not, and the next stage gets what is
    written there meanwhile. Losses then differ from run to run with no error. Outputs are kept.

    Serves: core/pipeline_parallel/schedules.py (`deallocate_output_tensor` after an asynchronous
    send in `forward_backward_pipelining_with_interleaving`), in 0.16 and 0.17.
    """

    def hook(module: types.ModuleType) -> None:
        from megatron.core import package_info
        from megatron.core.utils import get_model_config

        if family(package_info.__version__) not in before("0.18"):
            return
        original: Any = module.forward_backward_pipelining_with_interleaving

        @functools.wraps(original)
        def forward_backward_pipelining_with_interleaving(*args: Any, **kwargs: Any) -> Any:
            chunks = kwargs["model"]  # the parameters are keyword-only
            get_model_config(chunks[0]).deallocate_pipeline_outputs = False
            return original(*args, **kwargs)

        replace(
            module,
            forward_backward_pipelining_with_interleaving=(
                forward_backward_pipelining_with_interleaving
            ),
        )

    after_import("megatron.core.pipeline_parallel.schedules", hook)


class _AbsentLinear:
    """Stands for Transformer Engine's linear layer in questions whether something is one."""


@unit
def names_of_absent_engine() -> None:
    """megatron-core 0.16 asks for names that it has with Transformer Engine only.

    Routers look whether there is a matrix product of the engine's, latent attention whether a layer
    is one of the engine's. There is none, and it is not.

    Serves: core/transformer/moe/moe_utils.py (`te_general_gemm`), core/transformer/
    multi_latent_attention.py (`isinstance(..., TELinear)`), in 0.16 without Transformer Engine.
    """

    def routers(module: types.ModuleType) -> None:
        if not hasattr(module, "te_general_gemm"):
            replace(module, te_general_gemm=None)

    def latent_attention(module: types.ModuleType) -> None:
        if not isinstance(getattr(module, "TELinear", None), type):  # None or a mock object
            replace(module, TELinear=_AbsentLinear)

    after_import("megatron.core.transformer.moe.moe_utils", routers)
    after_import("megatron.core.transformer.multi_latent_attention", latent_attention)


@unit
def moe_split_sizes() -> None:
    """Expert parallelism makes NumPy arrays of its split sizes only if they are on a GPU.

    gloo's all-to-all takes no tensors for them. Only this place is told: a `Tensor.is_cuda` that
    says yes for CPU tensors would mislead torch and the optimizer's offloading.

    Serves: core/transformer/moe/moe_utils.py (`maybe_move_tensor_to_cpu`),
    core/transformer/moe/token_dispatcher.py (`all_to_all` with EP > 1).
    """

    def hook(module: types.ModuleType) -> None:
        original: Any = module.maybe_move_tensor_to_cpu

        @functools.wraps(original)
        def maybe_move_tensor_to_cpu(
            tensor: Any, as_numpy: bool = False, record_stream: bool = False
        ) -> Any:
            moved = original(tensor, as_numpy, record_stream)
            return moved.numpy() if as_numpy and hasattr(moved, "numpy") else moved

        replace(module, maybe_move_tensor_to_cpu=maybe_move_tensor_to_cpu)

    after_import("megatron.core.transformer.moe.moe_utils", hook)


class _Inert:
    """Stands for anything of triton: falsy, callable, and a decorator that changes nothing."""

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


class _InertModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()


@unit
def triton_stub() -> None:
    """A CPU build of torch brings no triton, but Megatron imports it unconditionally.

    No kernel of it runs here. torch itself asks whether triton exists and must go on hearing no:
    its answer is cached, and is asked for first. A real triton is left alone.

    Serves: core/transformer/moe/ops/paged_stash.py (imported by pipeline_parallel/schedules.py),
    training/initialize.py in 0.16.
    """
    if importlib.util.find_spec("triton") is not None:
        return
    from torch.utils._triton import has_triton_package

    has_triton_package()
    for name in ("triton", "triton.language"):
        module = _InertModule(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__["__version__"] = "0.0.0"
        sys.modules[name] = module
    sys.modules["triton"].__dict__["language"] = sys.modules["triton.language"]


@unit
def cpu_flags() -> None:
    """Megatron's defaults are for a GPU: its parser gets the flags that a CPU needs.

    Done where Megatron parses, so that a script which is not Megatron's keeps its own arguments.
    Rank 0 says what was added.

    Serves: training/arguments.py (`parse_args` reads sys.argv).
    """

    def hook(module: types.ModuleType) -> None:
        original: Any = module.parse_args

        @functools.wraps(original)
        def parse_args(*args: Any, **kwargs: Any) -> Any:
            if not {"-h", "--help"} & set(sys.argv[1:]):
                argv, notes = cpu_arguments(sys.argv[1:])
                sys.argv[1:] = argv
                if notes and os.environ.get("RANK", "0") == "0":
                    print("\n    ".join([_ON_CPU, *notes]), flush=True)
            return original(*args, **kwargs)

        replace(module, parse_args=parse_args)

    after_import("megatron.training.arguments", hook)
