# SPDX-License-Identifier: Apache-2.0
"""The attention schedule of a training run, built and told before the first step.

Once Megatron's arguments are complete, everything that a schedule depends on is known but the ends
of packed documents. Building it then finds settings that do not go together before anything is
allocated, and says which schedule `auto` took. Core attention asks for the same schedule later and
finds it in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_seqpar.attention import Schedule, build_schedule
from megatron_seqpar.attention.layouts import TokenLayout
from megatron_seqpar.attention.schedules import explain, make_problem
from megatron_seqpar.config import SeqParConfig, as_typed
from megatron_seqpar.errors import ScheduleError, UnsupportedError
from megatron_seqpar.integration import documents, lengths, masks, nodes
from megatron_seqpar.simulate import Cluster


def heads_of(args: Any) -> dict[str, Any]:
    """Heads of one tensor-parallel rank and their sizes, as `build_schedule` takes them."""
    tensor_parallel = args.tensor_model_parallel_size
    query_heads = args.num_attention_heads // tensor_parallel
    if getattr(args, "multi_latent_attention", False):
        return {
            "query_heads": query_heads,
            "kv_heads": query_heads,
            "head_dim": args.qk_head_dim + args.qk_pos_emb_head_dim,
            "value_dim": args.v_head_dim,
        }
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return {
        "query_heads": query_heads,
        "kv_heads": max(1, groups // tensor_parallel),  # fewer groups than ranks are repeated
        "head_dim": args.kv_channels,
        "value_dim": args.kv_channels,
    }


def layout_of(config: SeqParConfig, seq_length: int) -> TokenLayout:
    """Which tokens each rank owns."""
    size = config.sequence_parallel_size
    if config.token_layout == "zigzag":
        return TokenLayout.zigzag(size, seq_length)
    return TokenLayout.contiguous(size, seq_length=seq_length)


@dataclass(frozen=True)
class Planned:
    """The schedule for the layers that have one mask.

    why: what `auto` says of its choice; "" when the user named the schedule.
    """

    schedule: Schedule
    why: str = ""

    def line(self, dtype: object, batch: int) -> str:
        """For people: the schedule, what it is for and what it costs a layer.

        dtype: of queries, keys and values. batch: samples in a micro-batch.
        """
        schedule, problem = self.schedule, self.schedule.problem
        sent = sum(
            schedule.bytes_sent(rank, direction, dtype, batch=batch)
            for rank in range(schedule.size)
            for direction in ("forward", "backward")
        )
        return (
            f"seqpar: attention schedule {schedule.name} for {problem.mask.name} attention over "
            f"{problem.seq_length} tokens on {schedule.size} ranks ({problem.query_heads} query "
            f"and {problem.kv_heads} KV heads each): {100 * schedule.idle_fraction:.1f}% idle, "
            f"{sent / schedule.size / 2**20:.3g} MiB sent per rank, layer and micro-batch"
            + (f"; auto chose {self.why}" if self.why else "")
        )


def of_run(args: Any, config: SeqParConfig) -> Iterator[Planned]:
    """The schedule for each different mask of the model's layers.

    args: Megatron's validated arguments. With documents, whose ends only the data tells, a
        schedule is built for two halves as well, to find out whether the asked one serves them.
    Raises `UnsupportedError` when the asked schedule does not serve one of them, `ClusterError`
    for an unknown `--seqpar-cluster`.
    """
    seq_length = lengths.sequence_length(args)
    if seq_length is None or not getattr(args, "num_attention_heads", None):
        return
    layout = layout_of(config, seq_length)
    # the first axis of the job stands for all: they lie alike on the nodes
    first = range(0, args.tensor_model_parallel_size * layout.size, args.tensor_model_parallel_size)
    node_size = nodes.of_axis(first, config)
    sizes = {"layout": layout, "node_size": node_size, **heads_of(args)}
    cluster = nodes.cluster_of(config, node_size)
    for mask in masks.of_model(args):
        halves = [mask]
        if documents.expected(args):
            halves.append(documents.within(mask, (0, seq_length // 2, seq_length), seq_length))
        try:
            planned, *_ = [_planned(args, config, cluster, mask=each, **sizes) for each in halves]
        except ScheduleError as error:
            asked = ", ".join(as_typed(config, name) for name in ("schedule", "token_layout"))
            raise UnsupportedError(
                f"{asked} with --sequence-parallel-size {layout.size} and a {mask.name} mask: "
                f"{error}"
            ) from error
        yield planned


def _planned(args: Any, config: SeqParConfig, cluster: Cluster, **sizes: Any) -> Planned:
    if config.schedule != "auto":
        return Planned(build_schedule(config.schedule, **sizes))
    choice = explain(
        make_problem(**sizes), cluster=cluster, dtype=args.params_dtype, batch=args.micro_batch_size
    )
    return Planned(choice.schedule, choice.why())


def check(args: Any, config: SeqParConfig) -> None:
    """Build the run's schedules and print them on global rank 0 of a run with the axis.

    Raises as `of_run`.
    """
    speaks = config.active and getattr(args, "rank", None) == 0
    for planned in of_run(args, config):
        if speaks:
            print(planned.line(args.params_dtype, args.micro_batch_size), flush=True)
    if speaks and documents.expected(args):
        print("seqpar: documents get a schedule of their own in every micro-batch", flush=True)
