# SPDX-License-Identifier: Apache-2.0
"""GPTModel on documents: split over three ranks, on one rank, and every document by itself.

Megatron's own attention on the CPU takes no packed batch, so the truth of a packed one is the stock
model run on each document alone. Its multi-token-prediction loss is scaled by each document's
length then, so with multi-token prediction the truth is the packed batch on one rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.integration import documents, install, state
from megatron_seqpar.integration.batch import narrow_batch
from tests.support.pool import GlooPool
from tests.support.releases import on_this_cp_rank, since

SIZE, LENGTH, VOCABULARY = 3, 36, 24
PACKS = {
    "longer than a chunk": [3, 20, 13],
    "of one token": [1, 1, 9, 1, 12, 11, 1],
    "ending with chunks": [12, 4, 8, 12],
    "one document": [36],
}
PLAIN: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_cpu_initialization": True,
    "add_bias_linear": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "rope_type": "rope",
    "num_query_groups": 4,
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model, and how it embeds positions."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    latent: bool = False
    positions: str = "rope"
    recompute: str = "none"
    token_layout: str = "contiguous"

    @property
    def truth(self) -> SeqParConfig:
        """Settings of the model that nothing is split in."""
        return SeqParConfig(kernel="reference") if self.latent else SeqParConfig()

    def split(self, size: int) -> SeqParConfig:
        """Settings of the model over `size` ranks."""
        return SeqParConfig(
            size,
            token_layout=self.token_layout,
            kernel="reference",
            recompute=self.recompute,
        )


VARIANTS = {
    "gqa": Variant(),
    "learned positions": Variant(positions="learned_absolute"),
    "latent": Variant(LATENT, latent=True),
    "full recompute": Variant(FULL),
    "selective recompute": Variant(SELECTIVE),
    "attention-output": Variant(recompute="attention-output"),
}
ZIGZAG = pytest.param("zigzag", marks=since("0.19", "documents in the zigzag layout"))


def settle(config: SeqParConfig) -> None:
    """Megatron's groups with these settings, in a worker of the pool."""
    from megatron_seqpar import cpu_runtime

    cpu_runtime.activate()
    install(config)
    state.set_config(config)
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=config.sequence_parallel_size)


def build(variant: Variant, config: SeqParConfig, mtp: int | None = None) -> Any:
    """The model, its weights the same whatever the settings."""
    settle(config)  # before the first import of Megatron
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5)
    kind = MLATransformerConfig if variant.latent else TransformerConfig
    values = {**PLAIN, "context_parallel_size": config.sequence_parallel_size, **variant.options}
    made = kind(**values, mtp_num_layers=mtp)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(multi_latent_attention=variant.latent)
    more = {}
    if mtp is not None:
        more["mtp_block_spec"] = gpt_layer_specs.get_gpt_mtp_block_spec(made, spec, False)
    return GPTModel(
        made,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type=variant.positions,
        **more,
    )


def sample(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Tokens, labels, loss mask and positions within documents, each `[1, LENGTH]`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator),
        "labels": torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator),
        "loss_mask": (torch.rand(1, LENGTH, generator=generator) < 0.8).float(),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }


def pack(lengths: list[int]) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams("thd", ends, ends, None, None, max(lengths), max(lengths))


def losses(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Loss of every token that counts, `[b, s]`."""
    mask = batch["loss_mask"]
    out = model(
        batch["tokens"],
        batch["position_ids"],
        options.pop("attention_mask", None),
        labels=batch["labels"],
        loss_mask=mask,
        **options,
    )
    return out * mask


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def alone(variant: Variant, *packs: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of the stock model, document by document, `[packs, LENGTH]`."""
    model, rows = build(variant, variant.truth), []
    for seed, lengths in enumerate(packs):
        batch, parts = sample(lengths, seed), []
        for columns in torch.arange(LENGTH).split(lengths):
            part = losses(model, {key: value[:, columns] for key, value in batch.items()})
            part.sum().backward()
            parts.append(part.detach())
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows), gradients(model)


def together(
    variant: Variant, lengths: list[int], size: int, mtp: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of the packed batch over `size` ranks, of the whole sequence."""
    model, batch = build(variant, variant.split(size), mtp), sample(lengths)
    if size > 1:
        from megatron.core import parallel_state

        batch = narrow_batch(batch, parallel_state.get_context_parallel_group())
    own = losses(model, batch, packed_seq_params=pack(lengths))
    own.sum().backward()
    return joined(own.detach(), size), gathered(gradients(model), size)


def joined(own: torch.Tensor, size: int, token_layout: str = "contiguous") -> torch.Tensor:
    if size == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own.contiguous())
    if token_layout == "zigzag":
        pairs = [part.chunk(2, 1) for part in parts]
        parts = [early for early, _ in pairs] + [late for _, late in reversed(pairs)]
    return torch.cat(parts, 1)


def gathered(own: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    if size > 1:
        for gradient in own.values():
            dist.all_reduce(gradient)
    return own


def same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        apart = (got[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert apart < 1e-5, (name, float(apart))


def check_packed(rank: int, variant: Variant, lengths: list[int]) -> None:
    expected = alone(variant, lengths)
    same(together(variant, lengths, 1), expected)
    same(together(variant, lengths, SIZE), expected)


def check_multi_token_prediction(rank: int, lengths: list[int]) -> None:
    # Otherwise its loss is made for gradients averaged over ranks, and here they are summed.
    variant = Variant({"calculate_per_token_loss": True})
    expected = together(variant, lengths, 1, mtp=2)
    same(together(variant, lengths, SIZE, mtp=2), expected)


def dense(batch: list[list[int]]) -> torch.Tensor:
    """The stock mask of a batch of documents, `[b, 1, s, s]`, true where nothing is seen."""
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    number = [torch.repeat_interleave(torch.tensor(lengths)) for lengths in batch]
    return ~torch.stack([causal & (n[:, None] == n) for n in number])[:, None]


def check_unpacked(rank: int, variant: Variant, packs: list[list[int]]) -> None:
    """A batch of samples with different documents against the stock model and its dense mask."""
    samples = [sample(lengths, seed) for seed, lengths in enumerate(packs)]
    batch = {key: torch.cat([each[key] for each in samples]) for key in samples[0]}
    if variant.latent:
        expected = alone(variant, *packs)
    else:
        model = build(variant, variant.truth)
        part = losses(model, batch, attention_mask=dense(packs))
        part.sum().backward()
        expected = part.detach(), gradients(model)

    model = build(variant, variant.split(SIZE))
    from megatron.core import parallel_state

    begins = (batch["position_ids"] == 0).to(torch.uint8)
    own = {**batch, "attention_mask": documents.boundaries(begins)}
    group = parallel_state.get_context_parallel_group()
    own = on_this_cp_rank(own, group)
    part = losses(model, own, attention_mask=own["attention_mask"])
    part.sum().backward()
    whole = joined(part.detach(), SIZE, variant.token_layout)
    same((whole, gathered(gradients(model), SIZE)), expected)


@pytest.fixture(scope="module")
def pool():
    pytest.importorskip("megatron.core")
    workers = GlooPool(SIZE)
    yield workers
    workers.stop()


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_those_run_alone(pool, name):
    pool.run(check_packed, VARIANTS[name], PACKS["longer than a chunk"])


@pytest.mark.parametrize("name", PACKS)
def test_documents_of_any_length(pool, name):
    pool.run(check_packed, VARIANTS["gqa"], PACKS[name])


@pytest.mark.parametrize("name", ["longer than a chunk", "of one token"])
def test_multi_token_prediction_stays_inside_documents(pool, name):
    pool.run(check_multi_token_prediction, PACKS[name])


@pytest.mark.parametrize("name", [*VARIANTS, ZIGZAG])
def test_documents_of_a_batch_need_no_dense_mask(pool, name):
    variant = VARIANTS.get(name, Variant(token_layout="zigzag"))
    pool.run(check_unpacked, variant, list(PACKS.values()))
