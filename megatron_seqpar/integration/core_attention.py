# SPDX-License-Identifier: Apache-2.0
"""Megatron's core attention, distributed over the SP axis.

A drop-in for `DotProductAttention` and `TEDotProductAttention`: the same constructor keywords and
the same call, so any layer spec can hold it. It owns no parameters and no state, so checkpoints
are those of the stock model.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_seqpar.attention import Causal, Full, Mask, dist_flash_attention
from megatron_seqpar.attention.transport import LocalTransport, Transport
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import arguments, axis, recompute, refusals, state

_MASKS: dict[AttnMaskType, Mask] = {
    AttnMaskType.causal: Causal(),
    AttnMaskType.no_mask: Full(),
}


class SeqParCoreAttention(MegatronModule):
    """softmax(Q K^T * scale) V over a sequence split over the SP axis.

    Constructor keywords are Megatron's; `attention_dropout`, `k_channels`, `v_channels`,
    `num_splits` and `cp_comm_type` have no effect here and are accepted because layers pass them.
    Raises `UnsupportedError` for a configuration that attention cannot serve.
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
        context = arguments.context(settings)
        if unknown:
            raise UnsupportedError(
                f"core attention options {sorted(unknown)} with {context}: unknown to "
                "megatron_seqpar; this Megatron is newer than the versions it was checked on."
            )
        table = [row for row in refusals.REFUSALS if row.attribute != "context_parallel_size"]
        refusals.refuse(config, context, refusals.CONFIG, table=table)
        arguments.refuse_recompute(config, settings, refusals.CONFIG)
        if attention_dropout:
            raise UnsupportedError(
                f"attention_dropout {attention_dropout} with {context}: set --attention-dropout 0."
            )
        if attention_type != "self":
            raise UnsupportedError(
                f"attention_type {attention_type} with {context}: only self-attention is split "
                "over the axis; use tensor parallelism for encoder-decoder models."
            )
        self._mask_of(attn_mask_type)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = (
            softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        )
        if settings.active:
            self._transport: Transport = axis.require_matching(pg_collection).transport
        else:  # an axis of one rank, whatever tensor and data parallelism make of the world
            self._transport = LocalTransport()

    @staticmethod
    def _mask_of(attn_mask_type: AttnMaskType | None) -> Mask:
        mask = None if attn_mask_type is None else _MASKS.get(attn_mask_type)
        if mask is None:
            name = getattr(attn_mask_type, "name", attn_mask_type)
            raise UnsupportedError(
                f"attn_mask_type {name} with {arguments.context(state.config())}: masks given "
                "as tensors are not split over the axis; use "
                f"{' or '.join(kind.name for kind in _MASKS)}."
            )
        return mask

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
        attention_mask: ignored; the mask is causal or full as `attn_mask_type` says (the
            constructor's when None).
        Returns `[s_local, b, heads * head_dim]` in the dtype of `query`.
        Raises `UnsupportedError` for packed input, a bias, or a key/value cache.
        """
        settings = state.config()
        context = arguments.context(settings)
        if packed_seq_params is not None:
            raise UnsupportedError(
                f"packed_seq_params with {context}: packed (THD) input is not split over the "
                "axis; train on unpacked sequences."
            )
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
        compute = functools.partial(
            dist_flash_attention,
            query,
            key,
            value,
            group=self._transport,
            mask=self._mask_of(self.attn_mask_type if attn_mask_type is None else attn_mask_type),
            schedule=settings.schedule,
            softmax_scale=self.softmax_scale,
            tensor_layout="sbhd",
            kernel=settings.kernel,
            deterministic=bool(self.config.deterministic_mode),
            return_lse=True,
            overlap=settings.overlap,
            seq_length=query.shape[0] * self._transport.size,  # chunks are equal in training
        )
        keepsake = recompute.current()
        output = compute()[0] if keepsake is None else keepsake.attend(compute)
        return output.flatten(2)
