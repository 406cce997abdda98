# SPDX-License-Identifier: Apache-2.0
"""Packed batches split into contiguous chunks: each rank gets its share of the stock result."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_seqpar.attention import Causal, Documents
from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.integration import install, packed, state, uninstall
from megatron_seqpar.integration.batch import narrow
from tests.integration.test_rotary_mamba import Group
from tests.support.pool import GlooPool
from tests.support.releases import at_least, since

pytest.importorskip("megatron.core")
from megatron.core.packed_seq_params import PackedSeqParams

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=8)
SIZES = st.integers(1, 6)


@pytest.fixture(scope="module", autouse=True)
def installed():
    install(SeqParConfig())
    yield
    uninstall()


@pytest.fixture(autouse=True)
def settings():
    yield
    state.set_config(SeqParConfig())


def ends_of(lengths: list[int], size: int) -> torch.Tensor:
    """Ends of documents of these lengths and of one more that makes the whole divisible."""
    total = sum(lengths)
    lengths = [*lengths, -total % size or size]
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def params(cumulative: torch.Tensor, **more) -> PackedSeqParams:
    longest = int(cumulative.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **more,
    )


@given(LENGTHS, SIZES)
def test_positions_and_ends(lengths, size):
    cumulative = ends_of(lengths, size)
    spans = list(zip(cumulative.tolist(), cumulative[1:].tolist(), strict=False))
    count = int(cumulative[-1]) // size
    expected = [i for start, stop in spans for i in range(stop - start)]
    last = [i == stop - start - 1 for start, stop in spans for i in range(stop - start)]
    got = torch.cat([packed.positions(cumulative, count, rank) for rank in range(size)])
    ends = torch.cat([packed.ends_document(cumulative, count, rank) for rank in range(size)])
    assert got.tolist() == expected
    assert ends.tolist() == last


def test_tokens_behind_the_last_document():
    cumulative = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert packed.positions(cumulative, 4, 1).tolist() == [2, 0, 0, 0]
    assert packed.ends_document(cumulative, 4, 1).tolist() == [True, False, False, False]
    assert packed.behind(cumulative, 4, 1).tolist() == [False, True, True, True]


ROPE = types.SimpleNamespace(
    apply_rope_fusion=False,
    rotary_interleaved=False,
    multi_latent_attention=False,
    mrope_section=None,
)


@given(LENGTHS, SIZES, st.booleans(), st.booleans())
def test_rotary_embedding_is_the_ranks_share_of_the_stock_one(lengths, size, whole_table, latent):
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    cumulative = ends_of(lengths, size)
    total, longest = int(cumulative[-1]), int(cumulative.diff().max())
    generator = torch.Generator().manual_seed(total)
    tokens = torch.randn(total, 2, 8, generator=generator)
    table = torch.randn(total if whole_table else longest, 1, 1, 6, generator=generator)
    options = {
        "config": ROPE,
        "cu_seqlens": cumulative,
        "mscale": 1.3,
    }
    if at_least("0.19"):
        options["mla_rotary_interleaved"] = latent
    else:
        options["config"] = types.SimpleNamespace(
            **{**vars(ROPE), "multi_latent_attention": latent}
        )
    state.set_config(SeqParConfig())
    expected = apply_rotary_pos_emb(tokens, table, cp_group=Group(0, 1), **options)
    state.set_config(SeqParConfig(sequence_parallel_size=max(size, 2)))
    for rank in range(size):
        own = narrow(tokens, 0, rank, size)
        got = apply_rotary_pos_emb(own, table, cp_group=Group(rank, size), **options)
        assert torch.equal(got, narrow(expected, 0, rank, size))


def test_boundaries_are_read_once_for_each_micro_batch():
    class Counted(torch.Tensor):
        reads = 0

        def tolist(self):
            Counted.reads += 1
            return super().tolist()

    pack = params(torch.tensor([0, 3, 3, 8], dtype=torch.int32))
    pack.cu_seqlens_q = pack.cu_seqlens_q.as_subclass(Counted)
    assert [packed.ends(pack) for _ in range(3)] == [(0, 3, 3, 8)] * 3
    assert Counted.reads == 1
    assert packed.mask_of(Causal(), pack, 8) == Documents((0, 3, 8))
    assert packed.mask_of(Causal(), pack, 12) == Documents((0, 3, 8))


def test_padding_of_documents_is_apart_from_them():
    own = torch.tensor([0, 3, 7], dtype=torch.int32)
    padded = torch.tensor([0, 4, 12], dtype=torch.int32)
    pack = params(own, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded)
    assert packed.ends(pack) == (0, 3, 4, 8, 12)
    assert torch.equal(packed.cu_seqlens(pack), padded)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"qkv_format": "sbhd"}, "qkv_format sbhd"),
        ({"local_cp_size": 2}, "--hybrid-context-parallel"),
        ({"cp_group": object()}, "--hybrid-context-parallel"),
        ({"token_layout": "zigzag"}, "--seqpar-token-layout zigzag"),
    ],
)
def test_other_packings_are_refused(change, text):
    pack = params(torch.tensor([0, 4], dtype=torch.int32))
    packed.check(pack, "--sequence-parallel-size 2")
    layout = change.get("token_layout", "contiguous")
    state.set_config(SeqParConfig(sequence_parallel_size=2, token_layout=layout))
    for name, value in change.items():
        setattr(pack, name, value)
    with pytest.raises(UnsupportedError, match=text):
        packed.check(pack, "--sequence-parallel-size 2")


def check_roll(rank):
    install(SeqParConfig())
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    generator = torch.Generator().manual_seed(3)
    pair = dist.new_group([1, 2])
    groups = [(dist.group.WORLD, rank, 3)] + ([(pair, rank - 1, 2)] if rank else [])
    cases = [[5], [4, 4], [1, 1, 1], [0, 3, 0, 9], [2, 1, 7, 1]]
    cases += [torch.randint(0, 8, (6,), generator=generator).tolist() for _ in range(10)]
    for group, here, size in groups:
        for lengths in cases:
            pack = params(ends_of(lengths, size))
            total = int(pack.cu_seqlens_q[-1])
            for dtype in (torch.int64, torch.float32, torch.bool):
                whole = torch.randint(0, 2, (1, total), generator=generator).to(dtype)
                whole = whole if dtype == torch.bool else whole + 1
                state.set_config(SeqParConfig())
                expected, count = roll_tensor(whole, packed_seq_params=pack)
                state.set_config(SeqParConfig(sequence_parallel_size=size))
                own = narrow(whole, 1, here, size)
                got, own_count = roll_tensor(own, cp_group=group, packed_seq_params=pack)
                assert torch.equal(got, narrow(expected, 1, here, size)), (lengths, size)
                if dtype == torch.float32:  # a loss mask: counted over the axis
                    assert own_count == count / size
    with pytest.raises(UnsupportedError, match="token dim must be the last"):
        roll_tensor(torch.ones(2, 1), dims=0, cp_group=group, packed_seq_params=pack)


def test_rolling_stops_at_the_end_of_every_document():
    pool = GlooPool(3)
    try:
        pool.run(check_roll)
    finally:
        pool.stop()


class Tokenizer:
    """One token a character; the answer's tokens count, the rest are prompt."""

    eod, pad, vocab_size = 0, 1, 256

    def tokenize_conversation(self, conversation, return_target, add_generation_prompt):
        tokens = [ord(letter) for message in conversation for letter in message["content"]]
        targets = [
            ord(letter) if message["role"] == "assistant" else -100
            for message in conversation
            for letter in message["content"]
        ]
        return torch.tensor(tokens), torch.tensor(targets)


def sft_sample(size: int, conversations: list[int], length: int):
    """A sample of the stock SFT dataset with `size` ranks to split it over."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training.datasets.sft_dataset import SFTDataset

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        split="1,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        context_parallel_size=size,
    )
    dataset = object.__new__(SFTDataset)
    messages = []
    for count in conversations:
        messages += [
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": "a" * (count - 1)},
        ]
    dataset.config, dataset.dataset, dataset.indices = config, [messages], [0]
    return dataset[0]


@since("0.19", "packed samples over the axis")
@pytest.mark.parametrize("conversations", [[3, 5, 1, 4], [7], [9, 9]])
def test_sft_samples_are_those_of_one_rank(conversations):
    pytest.importorskip("megatron.training")
    expected = sft_sample(1, conversations, 15)
    state.set_config(SeqParConfig(sequence_parallel_size=3))
    got = sft_sample(3, conversations, 15)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    state.set_config(SeqParConfig())
    padded = sft_sample(3, conversations, 15)
    assert not torch.equal(padded["cu_seqlens"], got["cu_seqlens"]) or len(conversations) == 1
