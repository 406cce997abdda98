# SPDX-License-Identifier: Apache-2.0
"""Megatron's core attention, distributed over the SP axis.

A drop-in for `DotProductAttention` and `TEDotProductAttention`: the same constructor keywords and
the same call, so any layer spec can hold it. It owns what the stock attention owns, the softmax
offset of `--softmax-type learnable` and else nothing, under the same name and sharded alike, so
checkpoints are those of the stock model.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_seqpar.attention import Mask, dist_flash_attention, kernels
from megatron_seqpar.attention.transport import LocalTransport, Transport
from megatron_seqpar.config import as_typed, is_default
from megatron_seqpar.errors import KernelError, UnsupportedError
from megatron_seqpar.integration import (
    axis,
    documents,
    masks,
    measure,
    packed,
    recompute,
    recompute_parts,
    refusals,
    state,
)
from megatron_seqpar.integration.refusals_by_setting import refuse_by_setting


def _home() -> torch.device:
    """Where parameters live: as Megatron's layers have it, this process's GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class SeqParCoreAttention(MegatronModule):
    """softmax(Q K^T * scale) V over a sequence split over the SP axis.

    Constructor keywords are Megatron's; `attention_dropout`, `k_channels`, `v_channels`,
    `num_splits` and `cp_comm_type` have no effect here and are accepted because layers pass them.
    Raises `UnsupportedError` for a configuration that attention cannot serve.

    Attributes:
        softmax_offset: `[heads of this TP rank]`, logits of a virtual key with value zero, as
            stock attention has them: None, zeros, or a parameter, by `softmax_type`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__(config=config)
        settings = state.config()
        context = state.context(settings)
        if unknown:
            raise UnsupportedError(
                f"core attention options {sorted(unknown)} with {context}: unknown to "
                "megatron_seqpar; this Megatron is newer than the versions it was checked on."
            )
        table = [row for row in refusals.REFUSALS if row.attribute != "context_parallel_size"]
        refusals.refuse(config, context, refusals.CONFIG, table=table)
        refuse_by_setting(config, settings, refusals.CONFIG)
        if attention_dropout:
            raise UnsupportedError(
                f"attention_dropout {attention_dropout} with {context}: set --attention-dropout 0."
            )
        if attention_type != "self":
            raise UnsupportedError(
                f"attention_type {attention_type} with {context}: only self-attention is split "
                "over the axis; use tensor parallelism for encoder-decoder models."
            )
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self._mask = functools.partial(masks.of_layer, config, layer_number)
        self._mask(attn_mask_type)
        self.softmax_scale = (
            softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.tp_group = pg_collection.tp
        self._device = torch.empty(0, device=_home()).device
        self._make_softmax_offset()
        self._check_kernel(k_channels or config.kv_channels, v_channels or config.kv_channels)
        self._transport: Transport = LocalTransport()
        self._node_size, self._cluster = 1, None
        if settings.active:  # else one rank, whatever tensor and data parallelism make of the world
            ours = axis.require_matching(pg_collection)
            self._transport = ours.transport
            self._node_size, self._cluster = ours.node_size, ours.cluster

    def _make_softmax_offset(self) -> None:
        """As stock attention does, down to the draws from the random generator."""
        config = self.config
        self.softmax_offset: torch.Tensor | None = None
        kind = getattr(config, "softmax_type", "vanilla")
        if kind == "vanilla":
            return
        heads = config.num_attention_heads // self.tp_group.size()
        offset = torch.zeros(heads, device=self._device, dtype=config.params_dtype)
        if kind == "learnable":
            offset = torch.nn.Parameter(offset)
            if config.perform_initialization:
                offset = config.init_method(offset)
        self.softmax_offset = offset

    def _check_kernel(self, head_dim: int, value_dim: int) -> None:
        """Find out before the first step when no kernel, or not the asked one, serves the model."""
        settings = state.config()
        try:
            kernels.select(
                settings.kernel,
                device=self._device,
                dtype=self.config.params_dtype,
                head_dim=head_dim,
                value_dim=value_dim,
                deterministic=bool(self.config.deterministic_mode),
                softcap=bool(settings.softcap),
            )
        except KernelError as error:
            asked = " with ".join(
                as_typed(settings, name)
                for name in ("kernel", "softcap")
                if not is_default(settings, name)
            )
            raise KernelError(f"{asked or state.context(settings)}: {error}") from error

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The softmax offset, if it is a parameter, as the stock attention saves it."""
        if not isinstance(self.softmax_offset, torch.nn.Parameter):
            return {}
        stock = DotProductAttention.sharded_state_dict
        return stock(self, prefix, sharded_offsets, metadata)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend over the whole sequence from this rank's tokens.

        query: `[s_local, b, heads, head_dim]`, after rotary embedding, possibly strided.
        key, value: `[s_local, b, kv_heads, head_dim]`, likewise; kv_heads divides heads.
        attention_mask: document boundaries (`documents.boundaries`), else ignored: the mask is what
            `masks.of_layer` makes of `attn_mask_type` (the constructor's when None), inside each
            document.
        packed_seq_params: documents laid end to end; the tensors, and what is returned, have no b.
        Returns `[s_local, b, heads * head_dim]` in the dtype of `query`.
        Raises `UnsupportedError` for a bias or a key/value cache.
        """
        settings = state.config()
        context = state.context(settings)
        if attention_bias is not None:
            raise UnsupportedError(
                f"attention_bias with {context}: attention takes no bias; use rotary position "
                "embeddings."
            )
        if key.shape[0] != query.shape[0]:
            raise UnsupportedError(
                f"{key.shape[0]} keys for {query.shape[0]} queries with {context}: generation "
                "with a key/value cache is not served; load the checkpoint without the plugin."
            )
        if settings.recompute == recompute_parts.ATTENTION_QKV and not self.config.qk_layernorm:
            value = recompute_parts.alone(value, query, key)
        seq_length = query.shape[0] * self._transport.size  # chunks are equal in training
        inner = self._mask(self.attn_mask_type if attn_mask_type is None else attn_mask_type)
        mask: Mask | tuple[Mask, ...]
        if packed_seq_params is not None:
            packed.check(packed_seq_params, context)
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            mask = packed.mask_of(inner, packed_seq_params, seq_length)
        else:
            mask = documents.mask_of(inner, attention_mask, seq_length)
        transport, recorder = measure.current().attention(
            self._transport, query.device, self.layer_number
        )
        compute = functools.partial(
            dist_flash_attention,
            query,
            key,
            value,
            group=transport,
            mask=mask,
            schedule=settings.schedule,
            node_size=self._node_size,
            cluster=self._cluster,
            token_layout=settings.token_layout,
            softmax_scale=self.softmax_scale,
            softcap=settings.softcap,
            sink=self.softmax_offset,
            tensor_layout="sbhd",
            kernel=settings.kernel,
            deterministic=bool(self.config.deterministic_mode),
            return_lse=True,
            overlap=settings.overlap,
            recorder=recorder,
            seq_length=seq_length,
        )
        keepsake = recompute.current()
        output = compute()[0] if keepsake is None else keepsake.attend(compute)
        output = output.flatten(2)
        return output if packed_seq_params is None else output.squeeze(1)
