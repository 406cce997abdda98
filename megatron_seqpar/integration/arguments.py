# SPDX-License-Identifier: Apache-2.0
"""Our flags on Megatron's own command line.

Both supported versions look `add_megatron_arguments` up when they parse, so wrapping it adds the
flags, and wrapping the parser's `parse_known_args` sees every namespace first: there the SP size
is folded into `context_parallel_size` and unsupported combinations are refused. `validate_args`
runs after values from a checkpoint or a preset may have changed the namespace, so the refusals
run again around it. Nothing but plain types is stored: Megatron pickles the namespace.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from megatron_seqpar import config as settings
from megatron_seqpar.config import AUTO, SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import documents, fused_parts, lengths, refusals, state
from megatron_seqpar.integration.refusals_by_setting import refuse_by_setting

_FOLDED = "seqpar_folded"
"""Marks a namespace whose `context_parallel_size` is ours and not the user's."""

_REPLACED_BY_FOLDING = ("context_parallel_size", "yaml_cfg")
"""What cannot be judged later: folding overwrites the one, the other replaces the namespace."""


def wrap_add_megatron_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `training.arguments.add_megatron_arguments`."""

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        settings.add_arguments(parser, state.config())
        parse_known_args = parser.parse_known_args

        def parse_then_fold(
            args: Sequence[str] | None = None, namespace: Any = None
        ) -> tuple[argparse.Namespace, list[str]]:
            parsed, rest = parse_known_args(args, namespace)
            fold(parsed)
            return parsed, rest

        # argparse's parse_args calls parse_known_args, so this one override serves both.
        parser.parse_known_args = parse_then_fold  # type: ignore[method-assign, assignment]
        return parser

    return add_megatron_arguments


def fold(args: Any) -> None:
    """Take our settings from a parsed namespace into force and fold the axis into it, in place.

    Raises `UnsupportedError` for every combination that cannot be served and is known by now.
    """
    if getattr(args, _FOLDED, False):
        return
    config = settings.from_namespace(args)
    args.sequence_parallel_size = config.sequence_parallel_size
    check_names(config)
    state.set_config(config)
    if config.active:
        _refuse_early(args, config)
        args.context_parallel_size = config.sequence_parallel_size
    if config.replaces_core_attention and hasattr(args, "create_attention_mask_in_dataloader"):
        # A mask of s x s booleans would be the largest tensor of a long-context run.
        args.create_attention_mask_in_dataloader = documents.dataloader_makes_marks(args)
    setattr(args, _FOLDED, True)
    if AUTO in (config.mlp_chunks, config.loss_chunks):
        from megatron_seqpar.integration import memory_plan

        memory_plan.install()
    if config.report is not None:
        from megatron_seqpar.integration import report

        report.install(config.report)
    elif config.summary:
        from megatron_seqpar.integration import closing

        closing.install()
    if getattr(args, "tensorboard_dir", None):
        from megatron_seqpar.integration import tensorboard

        tensorboard.install(attention=config.replaces_core_attention)
    if config.trace is not None:
        # last, so that writing the trace is in nobody else's times
        from megatron_seqpar.integration import trace

        trace.install(config.trace, config.traced)


def check_names(config: SeqParConfig) -> None:
    """Refuse an unknown kernel name. Raises `UnsupportedError` with the known ones."""
    from megatron_seqpar.attention import kernels

    known = ("auto", *kernels.names())
    if config.kernel not in dict.fromkeys(known):
        raise UnsupportedError(
            f"--seqpar-kernel {config.kernel}: unknown kernel. Use one of: "
            f"{', '.join(dict.fromkeys(known))}."
        )


def wrap_validate_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch for `training.arguments.validate_args`."""

    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        config = state.config()
        refuse_by_setting(args, config, refusals.ARGUMENTS)
        if not config.replaces_core_attention:
            return original(args, *rest, **kwargs)
        from megatron_seqpar.integration import plan  # imports Megatron's core

        if not config.active:
            refusals.refuse(args, state.context(config), refusals.CONFIG)
            result = original(args, *rest, **kwargs)
            fused_parts.check(args)
            plan.check(args, config)
            return result
        _refuse_late(args, config)
        result = _validate_without_pairing(original, args, rest, kwargs, config)
        _refuse_late(args, config)
        refuse_by_setting(args, config, refusals.ARGUMENTS)
        fused_parts.check(args)
        plan.check(args, config)
        return result

    return validate_args


def _refuse_early(args: Any, config: SeqParConfig) -> None:
    """The refusals that the command line alone decides.

    With `--use-checkpoint-args` the checkpoint decides the rest, and `_refuse_late` judges them.
    """
    table = refusals.REFUSALS
    if getattr(args, "use_checkpoint_args", False):
        table = tuple(row for row in table if row.attribute in _REPLACED_BY_FOLDING)
    refusals.refuse(args, state.context(config), refusals.ARGUMENTS, table=table)
    if table is refusals.REFUSALS:
        _check_world_size(args, int(os.environ.get("WORLD_SIZE", "1")), config)


def _check_world_size(args: Any, world: int, config: SeqParConfig) -> None:
    lengths.check_world_size(
        world,
        config.sequence_parallel_size,
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
    )


def _refuse_late(args: Any, config: SeqParConfig) -> None:
    """The refusals that can only be judged when the namespace is complete."""
    # Our own fold must not be mistaken for the user's context parallelism.
    own = config.sequence_parallel_size
    if args.context_parallel_size != own:
        raise UnsupportedError(
            f"--context-parallel-size {args.context_parallel_size} with {state.context(config)}: "
            "something changed the size after the command line was parsed."
        )
    table = [row for row in refusals.REFUSALS if row.attribute != "context_parallel_size"]
    refusals.refuse(args, state.context(config), refusals.ARGUMENTS, table=table)
    _check_world_size(args, args.world_size, config)
    length = lengths.sequence_length(args)
    if length is not None:
        split = args.tensor_model_parallel_size if args.sequence_parallel else 1
        lengths.check_sequence_length(length, own, split, zigzag=not state.contiguous())


def _validate_without_pairing(
    original: Callable[..., Any], args: Any, rest: Any, kwargs: Any, config: SeqParConfig
) -> Any:
    """Run stock validation without its demand that each rank hold a pair of chunks.

    Stock code wants the length divisible by 2 P. A length divisible by P alone is shown to it
    rounded down to a multiple of 2 P (P tokens less) and restored afterwards; the one other
    check on the length, against the position table, is repeated here with the true value.
    """
    length, size = args.seq_length, config.sequence_parallel_size
    if length is None or length % (2 * size) == 0 or not state.contiguous():
        return original(args, *rest, **kwargs)
    shown = length - size
    args.seq_length = shown
    try:
        result = original(args, *rest, **kwargs)
    finally:
        args.seq_length = length
    if args.encoder_seq_length == shown:
        args.encoder_seq_length = length
    if args.max_position_embeddings < length:
        raise UnsupportedError(
            f"--max-position-embeddings {args.max_position_embeddings} with --seq-length "
            f"{length}: there must be a position for every token."
        )
    return result
