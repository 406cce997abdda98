# SPDX-License-Identifier: Apache-2.0
"""HybridModel without Transformer Engine: Megatron has only a TE layer spec for it, so one is here.

Attention (`*`), MLP (`-`) and MoE (`E`) layers are built of Megatron's own local modules. Mamba and
the other layers need CUDA kernels and are refused where a pattern asks for them. Before
megatron-core 0.18 the model is called MambaModel and its stack MambaStack.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

from megatron_seqpar.errors import UnsupportedError

from .import_hooks import after_import
from .registry import replace, unit


class _Refused:
    """A layer that the CPU cannot build; building it raises UnsupportedError."""

    symbol = ""
    kind = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError(
            f"--hybrid-layer-pattern with {self.symbol} ({self.kind}) needs CUDA kernels; "
            "without a GPU use * (attention), - (MLP) and E (MoE)"
        )


def _refused(symbol: str, kind: str) -> type[_Refused]:
    return type("Refused", (_Refused,), {"symbol": symbol, "kind": kind})


def local_stack_spec(stack: Any, submodules: Any) -> Any:
    """Megatron's spec of a hybrid stack with local modules; parameter names in checkpoints as TE's.

    stack: `HybridStack` or `MambaStack`. submodules: its dataclass of layers; those that it has
        not are left out. Imports Megatron.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        MoETransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp: Any = ModuleSpec(module=MLP, submodules=linears)
    if hasattr(MLP, "as_mlp_submodule"):  # since 0.18
        mlp = functools.partial(MLP.as_mlp_submodule, submodules=linears)
    moe = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    layers = {
        "mamba_layer": _refused("M", "Mamba"),
        "gdn_layer": _refused("G", "gated delta net"),
        "dsa_layer": _refused("D", "sparse attention"),
        "mla_layer": _refused("+", "multi-latent attention"),
        "attention_layer": ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={
                    "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
                },
            ),
        ),
        "mlp_layer": ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=mlp,
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
        "moe_layer": ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm, mlp=moe, mlp_bda=get_bias_dropout_add
            ),
        ),
    }
    known = {field.name for field in dataclasses.fields(submodules)}
    kept = {name: layer for name, layer in layers.items() if name in known}
    return ModuleSpec(module=stack, submodules=submodules(**kept))


def local_hybrid_stack_spec() -> Any:
    """What `hybrid_stack_spec` is here, since megatron-core 0.18."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules

    return local_stack_spec(HybridStack, HybridStackSubmodules)


def local_mamba_stack_spec() -> Any:
    """What `mamba_stack_spec` is here, before megatron-core 0.18."""
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules

    return local_stack_spec(MambaStack, MambaStackSubmodules)


@unit
def hybrid_layers() -> None:
    """The name that `--spec` usually gives, `hybrid_stack_spec`, means the local one.

    Serves: core/models/hybrid/hybrid_layer_specs.py (built of TE classes that are mocks without
    Transformer Engine), pretrain_hybrid.py; before 0.18 core/models/mamba/mamba_layer_specs.py,
    pretrain_mamba.py.
    """

    def hook(module: types.ModuleType) -> None:
        replace(module, hybrid_stack_spec=local_hybrid_stack_spec())

    def older_hook(module: types.ModuleType) -> None:
        if hasattr(module, "MambaLayerSubmodules") and not hasattr(module, "hybrid_stack_spec"):
            replace(module, mamba_stack_spec=local_mamba_stack_spec())

    after_import("megatron.core.models.hybrid.hybrid_layer_specs", hook)
    after_import("megatron.core.models.mamba.mamba_layer_specs", older_hook)


@unit
def hybrid_final_norm() -> None:
    """The hybrid stack names Transformer Engine's norm itself, not through its spec.

    Serves: core/models/hybrid/hybrid_block.py (`self.final_norm = TENorm(...)`); before 0.18
    core/ssm/mamba_block.py.
    """

    def hook(module: types.ModuleType) -> None:
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        replace(module, TENorm=WrappedTorchNorm)

    after_import("megatron.core.models.hybrid.hybrid_block", hook)
    after_import("megatron.core.ssm.mamba_block", hook)
