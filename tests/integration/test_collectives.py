# SPDX-License-Identifier: Apache-2.0
"""What crosses ranks outside attention, against the unsharded result, on gloo.

Every case runs on the whole world and on a group that is not the world, so that a group rank
mistaken for a global rank shows.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from megatron_seqpar.attention.layouts import TokenLayout
from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.integration import axis, install, loss, nodes, roll, state
from megatron_seqpar.integration.batch import narrow, narrow_batch
from tests.support.pool import GlooPool
from tests.support.releases import on_this_cp_rank, since

WORLD = 3


@pytest.fixture(scope="module")
def pool():
    workers = GlooPool(WORLD)
    yield workers
    workers.stop()


def groups(rank):
    """(group, rank in it, size) of the world and of the ranks [1, 2], where `rank` is in them."""
    pair = dist.new_group([1, 2])
    yield dist.new_group([0, 1, 2]), rank, 3
    if rank in (1, 2):
        yield pair, rank - 1, 2


def check_roll(rank):
    for group, here, size in groups(rank):
        generator = torch.Generator().manual_seed(0)
        for dtype in (torch.int64, torch.float32, torch.bool, torch.bfloat16):
            for shape, dim in (((2, 4 * size), -1), ((2, size), 1), ((3 * size, 2, 2), 0)):
                whole = torch.randint(0, 2, shape, generator=generator).to(dtype)
                expected = torch.roll(whole, -1, dim)
                expected.select(dim, -1).fill_(0)
                got = roll.roll_left(narrow(whole, dim, here, size), dim, group)
                assert torch.equal(got, narrow(expected, dim, here, size)), (dtype, shape, size)


def test_roll_left_equals_the_unsharded_roll(pool):
    pool.run(check_roll)


def check_batch(rank):
    for group, here, size in groups(rank):
        n = 6
        tokens = torch.arange(2 * n).view(2, n)
        batch = {
            "tokens": tokens,
            "labels": tokens + 1,
            "attention_mask": torch.arange(n)[:, None].expand(2, 1, n, n),
            "position_ids": None,
            "max_seqlen": torch.tensor([n]),
        }
        narrow_batch(batch, group)
        mine = slice(here * n // size, (here + 1) * n // size)
        assert torch.equal(batch["tokens"], tokens[:, mine])
        assert torch.equal(batch["labels"], tokens[:, mine] + 1)
        assert batch["attention_mask"].shape == (2, 1, n // size, n)
        assert batch["attention_mask"][0, 0, 0, 0] == mine.start
        assert batch["position_ids"] is None
        assert batch["max_seqlen"].tolist() == [n]


def test_batch_is_narrowed_to_contiguous_tokens(pool):
    pool.run(check_batch)


MASKS = {
    "none masked": lambda n: torch.ones(n),
    "first rank masked": lambda n: (torch.arange(n) >= n // 2).float(),
    "all but the first masked": lambda n: (torch.arange(n) == 0).float(),
    "all masked": lambda n: torch.zeros(n),
    "uneven": lambda n: (torch.arange(n) % 5 != 1).float(),
}


def check_loss(rank, mask_name):
    """Gradients averaged over the axis, as Megatron's DDP does, against one rank's."""
    for group, here, size in groups(rank):
        n = 12
        values = torch.linspace(0.5, 2.0, n)
        mask = MASKS[mask_name](n)
        scale = torch.ones((), requires_grad=True)

        def loss_func(part, own_mask, scale=scale):
            total = (part * scale * own_mask).sum()
            return total, own_mask.sum().to(torch.int), {}

        own = narrow(values, 0, here, size), narrow(mask, 0, here, size)
        total, tokens, _ = loss.exact(loss_func, group)(*own)
        (total / torch.clamp(tokens, min=1)).backward()
        dist.all_reduce(scale.grad, group=group)
        expected = (values * mask).sum() / mask.sum().clamp(min=1)
        torch.testing.assert_close(scale.grad / size, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mask_name", MASKS)
def test_loss_average_is_exact(pool, mask_name):
    pool.run(check_loss, mask_name)


def check_legacy_loss(rank):
    for group, _, _ in groups(rank):
        assert loss.exact(lambda: (3.0, {"lm loss": 1}), group)() == (3.0, {"lm loss": 1})


def test_two_element_losses_pass_through(pool):
    pool.run(check_legacy_loss)


@dataclasses.dataclass
class MTPConfig:
    """The fields of TransformerConfig that the MTP loss reads."""

    mtp_num_layers: int = 2
    mtp_loss_scaling_factor: float = 0.3
    calculate_per_token_loss: bool = False
    mtp_detach_heads: bool = False


def mtp_gradient(hidden, labels, mask, config, group, process):
    """Gradient of the MTP losses with respect to `hidden`, `[depths + 1, s, b, h]`."""
    hidden = hidden.clone().requires_grad_()
    output = process(
        hidden_states=hidden.flatten(0, 1),
        labels=labels,
        loss_mask=mask,
        output_layer=lambda x, **_: (x, None),
        output_weight=None,
        runtime_gather_output=None,
        is_training=False,
        compute_language_model_loss=lambda y, x: x.sum(-1).transpose(0, 1) * (1 + y),
        config=config,
        cp_group=group,
    )
    output.sum().backward()
    return hidden.grad


def cut(tensor, dim, rank, size, layout):
    """A rank's tokens of a whole tensor."""
    if layout == "contiguous":
        return narrow(tensor, dim, rank, size)
    pieces = TokenLayout.zigzag(size, tensor.shape[dim]).pieces[rank]
    return torch.cat([tensor.narrow(dim, piece.start, piece.size) for piece in pieces], dim)


def check_mtp(rank, mask_name, per_token, layout):
    install(SeqParConfig())
    torch.cuda.current_device = lambda: "cpu"  # where stock code receives
    from megatron.core.transformer import multi_token_prediction as mtp

    config = MTPConfig(calculate_per_token_loss=per_token)
    for group, here, size in groups(rank):
        n = 12
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(3, n, 2, 4, generator=generator)
        labels = torch.randint(0, 9, (2, n), generator=generator)
        mask = MASKS[mask_name](n).expand(2, n).clone()
        state.set_config(SeqParConfig())
        whole = mtp_gradient(hidden, labels, mask, config, None, mtp.process_mtp_loss)
        state.set_config(SeqParConfig(sequence_parallel_size=size, token_layout=layout))
        own = mtp_gradient(
            cut(hidden, 1, here, size, layout),
            cut(labels, 1, here, size, layout),
            cut(mask, 1, here, size, layout),
            config,
            group,
            mtp.process_mtp_loss,
        )
        # hidden of depth 0 carries the main loss, which this test makes a plain sum.
        expected, got = cut(whole, 1, here, size, layout)[1:], own[1:]
        if not per_token:
            got = got / size
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@since("0.17", "function of its own for the MTP loss")
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("mask_name", ["none masked", "first rank masked", "uneven"])
def test_mtp_loss_average_is_exact(pool, mask_name, per_token, layout):
    pool.run(check_mtp, mask_name, per_token, layout)


def check_stock_slicing(rank):
    """The order that stock code cuts in is the zigzag token layout's."""
    install(SeqParConfig())
    for group, here, size in groups(rank):
        state.set_config(SeqParConfig(sequence_parallel_size=size, token_layout="zigzag"))
        tokens = torch.arange(24).view(2, 12)
        batch = on_this_cp_rank({"tokens": tokens.clone(), "labels": None}, group)
        assert torch.equal(batch["tokens"], cut(tokens, 1, here, size, "zigzag"))
        assert batch["labels"] is None


def test_zigzag_batches_are_cut_by_stock_code(pool):
    pool.run(check_stock_slicing)


def check_cluster(rank):
    """Every rank of an axis reckons with the cluster that its first rank sees."""
    nodes.cluster_of = lambda config, node_size: f"seen by {rank}, {node_size} a node"
    for group, here, size in groups(rank):
        first = dist.get_global_rank(group, 0)
        assert axis._shared_cluster(group, size) == f"seen by {first}, {size} a node", here


def test_one_cluster_for_an_axis(pool):
    pool.run(check_cluster)
