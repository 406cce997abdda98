# SPDX-License-Identifier: Apache-2.0
"""`--seqpar-loss-chunks`: the LM head of GPTModel and of hybrid models, piece by piece.

While such a model computes a loss, its output layer gives out `UnmadeLogits`, which remember what
they would be made of, and the model's loss function makes them in pieces (`memory.cross_entropy`).
Each piece goes through the stock forward of the stock output layer, so tied and frozen weights,
transfers of tensor parallelism, TP-SP and gradient accumulation fusion are Megatron's own. The
heads of multi-token prediction go the same way, with their acceptance counts.

Nothing but the loss may look at the logits: anything else that tries gets an error. Without labels,
as in inference, the model gives its logits as ever. Evaluation with labels is in pieces too.

It takes the place of `--cross-entropy-loss-fusion`, whichever its implementation: one product with
the head more, but no logits kept. `--fp16-lm-cross-entropy` is read by no such model in
megatron-core 0.16.1 to 0.19.2, and changes nothing here either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_seqpar.config import as_typed, is_default
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import refusals, state
from megatron_seqpar.integration.mlp import in_main_grad
from megatron_seqpar.integration.refusals_by_setting import LOSS_CHUNKS_REFUSALS
from megatron_seqpar.memory.cross_entropy import ChunkedLoss, chunked_cross_entropy

_predictions_wanted: ContextVar[bool] = ContextVar("seqpar_predictions_wanted", default=False)
"""Whether somebody will ask which token the logits at hand find the likeliest."""


def _refuse(use: str) -> NoReturn:
    raise UnsupportedError(
        f"{as_typed(state.config(), 'loss_chunks')}: something uses the logits of the whole "
        f"sequence ({use}), which are never made. Use --seqpar-loss-chunks off."
    )


@dataclasses.dataclass(eq=False)
class UnmadeLogits:
    """What stands where logits would be, until the loss asks for them.

    project: the output layer's own forward, `[n, b, h] -> (logits, bias)`, with weight= to use.
    layer: the output layer.
    hidden: `[s, b, h]`; with TP-SP this rank's share of the sequence.
    weight: what it is multiplied with, if not the layer's own weight.
    scale: what the logits are multiplied with, as MuP does.
    predict: whether `predictions` will be asked for.
    """

    project: Callable[..., Any]
    layer: torch.nn.Module
    hidden: torch.Tensor
    weight: torch.Tensor | None
    predict: bool
    scale: float | None = None
    predictions: torch.Tensor | None = None

    def parameters(self) -> list[torch.Tensor]:
        """What the logits depend on besides the hidden states."""
        if self.weight is None:
            return list(self.layer.parameters())
        # Not the layer's own weight: data parallelism would hear of a gradient that never comes.
        unused = (self.weight, getattr(self.layer, "weight", None))
        others = (p for p in self.layer.parameters() if all(p is not q for q in unused))
        return [self.weight, *others]

    def loss(self, labels: torch.Tensor, chunks: int, group: Any) -> torch.Tensor:
        """The loss of every token, `[s, b]`, and, if wanted, the predictions, which stay here.

        labels: `[s, b]`. group: the tensor-parallel group.
        """

        # The graph keeps `project` to the end of backward, and must not keep `hidden` with it.
        layer, weight, scale = self.project, self.weight, self.scale

        def project(piece: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = layer(piece, weight=weight)[0]
            return logits if scale is None else logits * scale

        result: ChunkedLoss = chunked_cross_entropy(
            project,
            self.hidden,
            labels,
            self.parameters(),
            chunks=chunks,
            group=group,
            predictions=self.predict,
            elsewhere=in_main_grad,
        )
        self.predictions = result.predictions
        return result.loss

    def __mul__(self, factor: float) -> UnmadeLogits:
        if not isinstance(factor, (int, float)):
            _refuse(f"multiplied with a {type(factor).__name__}")
        scale = factor if self.scale is None else self.scale * factor
        return dataclasses.replace(self, scale=scale)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols that Python only asks for
            raise AttributeError(name)
        _refuse(f"its .{name}")

    @classmethod
    def __torch_function__(cls, function: Any, *rest: Any, **kwargs: Any) -> NoReturn:
        _refuse(getattr(function, "__name__", str(function)))

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse("some of its elements")

    def __len__(self) -> NoReturn:
        _refuse("its length")

    def __bool__(self) -> NoReturn:
        _refuse("its truth value")


@contextlib.contextmanager
def _unmade(layer: torch.nn.Module, ranks: int) -> Iterator[None]:
    """Let an output layer give out `UnmadeLogits`; its vocabulary is over `ranks`.

    Only for the time of one call, so that the model is as it was for whoever copies or saves it.
    """
    project, before = layer.forward, vars(layer).get("forward")

    def forward(
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[UnmadeLogits, None]:
        gathers = getattr(layer, "gather_output", False)
        if runtime_gather_output is not None:
            gathers = runtime_gather_output
        if gathers and ranks > 1:
            _refuse("gathered over tensor-parallel ranks")
        return UnmadeLogits(project, layer, input_, weight, _predictions_wanted.get()), None

    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _group(model: Any) -> Any:
    """The tensor-parallel group of a model; None in a process without groups."""
    from megatron.core.utils import get_tensor_model_parallel_group_if_none

    return get_tensor_model_parallel_group_if_none(model.pg_collection.tp)


@functools.lru_cache(maxsize=1)
def _tell_of_fusion() -> None:
    """Say once, on rank 0, whose place the pieces take."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        setting = as_typed(state.config(), "loss_chunks")
        print(f"seqpar: {setting} takes the place of --cross-entropy-loss-fusion", flush=True)


def wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for what calls a model's output layer and then its loss.

    That is `GPTModel._postprocess`, and `forward` of `HybridModel` or, before 0.18, `MambaModel`.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_default(state.config(), "loss_chunks") or not self.post_process:
            return original(self, *args, **kwargs)
        labels = signature.bind(self, *args, **kwargs).arguments.get("labels")
        if labels is None or not state.loss_chunks():
            return original(self, *args, **kwargs)
        refusals.refuse(
            self.config,
            as_typed(state.config(), "loss_chunks"),
            refusals.CONFIG,
            table=LOSS_CHUNKS_REFUSALS,
        )
        if self.config.cross_entropy_loss_fusion:
            _tell_of_fusion()
        group = _group(self)
        with _unmade(self.output_layer, 1 if group is None else group.size()):
            return original(self, *args, **kwargs)

    return forward


def wrap_compute_language_model_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `LanguageModule.compute_language_model_loss`: `[b, s]` labels, `[b, s]` loss."""

    @functools.wraps(original)
    def compute_language_model_loss(self: Any, labels: torch.Tensor, logits: Any) -> torch.Tensor:
        off = is_default(state.config(), "loss_chunks") or not state.loss_chunks()
        if not isinstance(logits, UnmadeLogits):
            if off:
                loss: torch.Tensor = original(self, labels, logits)
                return loss
            raise UnsupportedError(
                f"{as_typed(state.config(), 'loss_chunks')}: {type(self).__name__} computes a loss "
                "from logits of the whole sequence. Models built on GPTModel or HybridModel are "
                "served; use --seqpar-loss-chunks off for others."
            )
        by_position = labels.transpose(0, 1).contiguous()
        found = logits.loss(by_position, state.loss_chunks(), _group(self))
        return found.transpose(0, 1).contiguous()

    return compute_language_model_loss


def wrap_process_mtp_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `multi_token_prediction.process_mtp_loss` of 0.19: in training it counts how often
    the likeliest token is the label, so its heads must find that token as they compute the loss.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def process_mtp_loss(*args: Any, **kwargs: Any) -> Any:
        training = signature.bind(*args, **kwargs).arguments["is_training"]
        token = _predictions_wanted.set(bool(training))
        try:
            return original(*args, **kwargs)
        finally:
            _predictions_wanted.reset(token)

    return process_mtp_loss


def wrap_compute_mtp_acceptance_counts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `multi_token_prediction._compute_mtp_acceptance_counts` of 0.19.

    Returns (tokens whose prediction is the label, tokens that count), 0-d fp32.
    """

    @functools.wraps(original)
    def compute_mtp_acceptance_counts(
        mtp_logits: Any,
        mtp_labels: torch.Tensor,
        loss_mask: torch.Tensor,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(mtp_logits, UnmadeLogits):
            return original(mtp_logits, mtp_labels, loss_mask, *rest, **kwargs)
        if mtp_logits.predictions is None:
            _refuse("its largest, before its loss is computed")
        counts = loss_mask.bool()
        right = (mtp_logits.predictions.transpose(0, 1) == mtp_labels) & counts
        return right.sum().float(), counts.sum().float()

    return compute_mtp_acceptance_counts
