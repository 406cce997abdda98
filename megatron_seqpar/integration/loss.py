# SPDX-License-Identifier: Apache-2.0
"""Average the loss over all tokens of a sequence, not over ranks.

Without `--calculate-per-token-loss` Megatron divides each rank's summed loss by that rank's own
token count and then averages the gradients over data-parallel and context-parallel ranks.
Contiguous chunks gather padding and prompt masks on some ranks, and a mean of means is then not
the mean: with one rank fully masked its share would count as zero instead of not counting.

With L_r the summed loss and n_r the tokens of group rank r, the gradient of one sequence must be
that of sum(L_r) / N, N = sum(n_r). The average over the axis is 1/P sum(L_r / d_r), so the divisor
has to be d_r = N / P on every rank. Stock code divides by max(n_r, 1); multiplying L_r by
max(n_r, 1) * P / N first gives exactly that, and is a multiplication by 1 when counts are equal.

The logged loss needs nothing: stock code sums losses and tokens over the axis, then divides.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_seqpar.integration import state


def correction(num_tokens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The factor max(n_r, 1) * P / max(N, 1), a 0-d float32 tensor.

    num_tokens: 0-d, the tokens n_r that count on this rank in one micro-batch.
    """
    total = num_tokens.detach().clone()
    dist.all_reduce(total, group=group)
    size = dist.get_world_size(group)
    own = torch.clamp(num_tokens.detach(), min=1).float()
    return own * size / torch.clamp(total, min=1).float()


def exact(loss_func: Callable[..., Any], group: dist.ProcessGroup) -> Callable[..., Any]:
    """A loss function whose loss, divided by its token count, averages exactly over the axis.

    Two-element results (loss, report) come from loss functions that do their own averaging over
    the axis, as stock code expects of them; they pass through.
    """

    def loss_func_over_axis(*args: Any, **kwargs: Any) -> Any:
        outputs = loss_func(*args, **kwargs)
        if not isinstance(outputs, tuple) or len(outputs) != 3:
            return outputs
        loss, num_tokens, report = outputs
        return loss * correction(num_tokens, group).to(loss.dtype), num_tokens, report

    return loss_func_over_axis


def wrap_forward_step_calc_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `schedules.forward_step_calc_loss`."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward_step_calc_loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        arguments = bound.arguments
        averages = not (
            arguments["config"].calculate_per_token_loss or arguments["collect_non_loss_data"]
        )
        if state.active() and averages and arguments["loss_func"] is not None:
            # The stock group, not attention's: this is a collective among other collectives.
            from megatron.core import parallel_state

            group = parallel_state.get_context_parallel_group()
            arguments["loss_func"] = exact(arguments["loss_func"], group)
        return original(*bound.args, **bound.kwargs)

    return forward_step_calc_loss


def wrap_expert_loss_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `schedules.forward_step_calc_loss` before 0.19: losses of a mixture of experts.

    With `--calculate-per-token-loss` gradients are divided by the tokens of all ranks, and a router
    multiplies its auxiliary and z losses with tokens to make up for it: before 0.19 with its own
    rank's tokens only, which leaves them P times too small (0.19 multiplies with P itself).
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward_step_calc_loss(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        config = signature.bind(*args, **kwargs).arguments["config"]
        experts = getattr(config, "num_moe_experts", None)
        if state.active() and config.calculate_per_token_loss and experts is not None:
            from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

            scale = MoEAuxLossAutoScaler.main_loss_backward_scale
            MoEAuxLossAutoScaler.set_loss_scale(scale * state.config().sequence_parallel_size)
        return result

    return forward_step_calc_loss
