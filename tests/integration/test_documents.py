# SPDX-License-Identifier: Apache-2.0
"""Documents of unpacked samples: their boundaries are those of Megatron's own dense mask."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_seqpar.attention import Causal, Documents, SlidingWindow
from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import documents, install, state, uninstall
from tests.support.pool import GlooPool
from tests.support.releases import since

gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset")

EOD = 0
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
OURS = SeqParConfig(kernel="cpu")  # our attention on one rank
in_the_data_loader = since("0.19", "marks of documents in the data loader")


@pytest.fixture
def installed():
    install(OURS)
    yield
    uninstall()


def seen(mask, length: int) -> torch.Tensor:
    """The pairs that interact, bool `[queries, keys]`."""
    distance = torch.arange(length) - torch.arange(length)[:, None]
    pairs = torch.zeros(length, length, dtype=torch.bool)
    for region in mask.regions(length):
        block = slice(*region.q), slice(*region.kv)
        low = -length if region.low is None else region.low
        high = length if region.high is None else region.high
        pairs[block] |= (distance[block] >= low) & (distance[block] <= high)
    return pairs


@given(TOKENS)
def test_boundaries_are_those_of_the_dense_mask(tokens):
    data = torch.tensor(tokens)
    dense, _, _ = gpt_dataset._get_ltor_masks_and_position_ids(data, EOD, True, True, False, True)
    found = documents.boundaries(documents.marks(data, EOD)[None])
    assert documents.are_boundaries(found)
    mask = documents.mask_of(Causal(), found, len(tokens))
    assert torch.equal(seen(mask, len(tokens)), ~dense[0])


@given(st.lists(TOKENS.map(lambda t: (t * 40)[:40]), min_size=1, max_size=4))
def test_every_sample_of_a_batch_has_its_own(batch):
    data = torch.tensor(batch)
    found = documents.boundaries(documents.marks(data, EOD))
    masks = documents.mask_of(SlidingWindow(5), found, 40)
    for row, mask in zip(data, masks if len(batch) > 1 else [masks], strict=True):
        alone = documents.boundaries(documents.marks(row[None], EOD))
        assert mask == documents.mask_of(SlidingWindow(5), alone, 40)


def test_a_whole_document_is_the_inner_mask():
    padded = torch.tensor([[0, 8, 8], [0, 3, 8]], dtype=torch.int32)
    assert documents.mask_of(Causal(), padded, 8) == (Causal(), Documents((0, 3, 8)))
    assert documents.mask_of(Causal(), None, 8) == Causal()
    assert documents.mask_of(Causal(), torch.ones(1, 1, 8, 8).bool(), 8) == Causal()
    assert documents.within(Causal(), (0, 0, 3, 3, 6), 8) == Documents((0, 3, 6))


@in_the_data_loader
@pytest.mark.parametrize("reset", [True, False])
def test_the_data_loader_makes_marks_and_no_matrix(installed, reset):
    tokens = torch.tensor([5, EOD, EOD, 7, 8, EOD])
    made = gpt_dataset._get_ltor_masks_and_position_ids(tokens, EOD, True, reset, True, True)
    begins, loss_mask, position_ids = made
    assert begins.dtype == torch.uint8
    assert begins.tolist() == ([1, 0, 1, 1, 0, 0] if reset else [1, 0, 0, 0, 0, 0])
    assert loss_mask.tolist() == [1, 0, 0, 1, 1, 0]
    assert position_ids.tolist() == [0, 1, 0, 0, 1, 2]
    state.set_config(SeqParConfig())
    stock = gpt_dataset._get_ltor_masks_and_position_ids(tokens, EOD, True, reset, True, True)
    assert stock[0].shape == (1, 6, 6)
    assert torch.equal(stock[1], loss_mask)
    assert torch.equal(stock[2], position_ids)


def arguments(**given):
    """Arguments of `get_batch_on_this_tp_rank` for a batch of two samples of eight tokens."""
    values = {
        "has_cu_seqlens": False,
        "is_hybrid_cp": False,
        "create_attention_mask_in_dataloader": True,
        "broadcast_src_rank": 0,
        "broadcast_group": None,
        "cp_size": 2,
        "tp_rank": 0,
        "micro_batch_size": 2,
        "seq_length": 8,
        "mtp_on_this_rank": False,
    }
    return {**values, **given}


def batch_of(begins):
    tokens = torch.arange(16).view(2, 8)
    return {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": torch.ones(2, 8),
        "position_ids": tokens % 8,
        "attention_mask": begins,
    }


BEGINS = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
BOUNDARIES = [[0, 3, 7, 8], [0, 8, 8, 8]]


def check_broadcast(rank):
    """Both ranks of a tensor-parallel group get the documents of the first one's batch."""
    install(OURS)
    torch.cuda.current_device = lambda: "cpu"
    from megatron.core.utils import get_batch_on_this_tp_rank

    for stage in (
        {},
        {"pipeline_model_parallel_size": 3, "is_pipeline_first_stage": True},
        {"pipeline_model_parallel_size": 3},
        {"pipeline_model_parallel_size": 3, "is_pipeline_last_stage": True},
        {"pipeline_model_parallel_size": 3, "mtp_on_this_rank": True},
    ):
        batch = batch_of(BEGINS.clone()) if rank == 0 else {}
        given = arguments(broadcast_group=dist.group.WORLD, tp_rank=rank, **stage)
        got = get_batch_on_this_tp_rank(batch, **given)
        assert got["attention_mask"].tolist() == BOUNDARIES
        assert got["attention_mask"].dtype == torch.int32
        middle = stage == {"pipeline_model_parallel_size": 3}
        last = stage.get("is_pipeline_last_stage", False)
        assert (got["tokens"] is None) == (middle or last)
        if got["tokens"] is not None:
            assert torch.equal(got["tokens"], torch.arange(16).view(2, 8))
        assert middle == all(got[key] is None for key in ("tokens", "labels", "loss_mask"))


@in_the_data_loader
def test_documents_reach_all_tensor_ranks_and_all_stages():
    pool = GlooPool(2)
    try:
        pool.run(check_broadcast)
    finally:
        pool.stop()


@in_the_data_loader
@pytest.mark.parametrize("found", [None, torch.ones(2, 1, 8, 8, dtype=torch.bool)])
def test_a_dataset_without_marks_is_refused(installed, found):
    from megatron.core.utils import get_batch_on_this_tp_rank

    with pytest.raises(UnsupportedError, match=r"--reset-attention-mask.*GPTDataset"):
        get_batch_on_this_tp_rank(batch_of(found), **arguments())


def test_who_makes_marks():
    wanted = {"reset_attention_mask": True}
    for flags, marks in (
        ({}, False),
        (wanted, True),
        ({**wanted, "sft": True}, False),
        ({**wanted, "dataloader_inter_document_masking": True}, False),
    ):
        args = types.SimpleNamespace(**flags)
        assert documents.dataloader_makes_marks(args) is marks
        assert documents.expected(args) is bool(flags)


@in_the_data_loader
@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (OURS, {"reset_attention_mask": True}, True),
        (OURS, {}, False),
        (OURS, {"reset_attention_mask": True, "sft": True}, True),
        (OURS, {"dataloader_inter_document_masking": True}, True),
        (SeqParConfig(), {"reset_attention_mask": True}, False),
    ],
)
def test_stages_between_read_data_when_there_are_documents(
    installed, monkeypatch, config, given, expected
):
    training = pytest.importorskip("megatron.training")
    from megatron.core import parallel_state
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = types.SimpleNamespace(**given)
    monkeypatch.setattr(training, "get_args", lambda: args)
    for name in ("is_pipeline_first_stage", "is_pipeline_last_stage"):
        monkeypatch.setattr(parallel_state, name, lambda **_: False)
    state.set_config(config)
    assert is_first_or_last_pipeline_stage(None) is expected
