# SPDX-License-Identifier: Apache-2.0
"""The MFU formula against published figures, and the sizes read from Megatron's flags."""

from pathlib import Path

import pytest

from megatron_seqpar.errors import SeqParError, UnsupportedError
from megatron_seqpar.mfu import (
    Model,
    Window,
    load_model,
    model_flops,
    model_from_flags,
    peak_of,
    utilization,
)

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
LLAMA_13B = {
    "num-layers": 40,
    "hidden-size": 5120,
    "num-attention-heads": 40,
    "ffn-hidden-size": 13824,
    "swiglu": True,
    "vocab-size": 128000,
    "untie-embeddings-and-output-weights": True,
}
PALM_540B = {
    "num-layers": 118,
    "hidden-size": 18432,
    "num-attention-heads": 48,
    "kv-channels": 256,
    "num-query-groups": 1,
    "ffn-hidden-size": 73728,
    "swiglu": True,
    "vocab-size": 256000,
}


def test_palm_540b() -> None:
    """PaLM's appendix B: 238.3K tokens/s on 6,144 TPU v4 of 275 TFLOP/s are 46.2%."""
    model = model_from_flags(PALM_540B)
    assert model.parameters == pytest.approx(540.35e9, rel=2e-3)
    flops = model_flops(model, 2048) / 2048
    assert utilization(flops * 238.3e3, 1.0, 6144, 275e12) == pytest.approx(0.462, abs=1e-3)


def test_layouts_study_13b() -> None:
    """The best 13B run of arXiv 2311.05610: 26.54 s a step of 2,048 x 2,048 on 64 A100, 70.5%."""
    flops = model_flops(model_from_flags(LLAMA_13B), 2048, 2048)
    assert utilization(flops, 26.54, 64, 312e12) == pytest.approx(0.705, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("llama2-7b", 6.74, 6.74),
        ("llama3-8b", 8.03, 8.03),
        ("mistral-7b", 7.24, 7.24),
        ("qwen2.5-7b", 7.62, 7.62),
        ("qwen3-8b", 8.19, 8.19),
        ("gemma2-9b", 9.24, 9.24),
        ("mixtral-8x7b", 46.7, 12.9),
    ],
)
def test_published_parameter_counts(name: str, billions: float, active: float) -> None:
    model = load_model(MODELS / f"{name}.yaml")
    assert model.parameters == pytest.approx(billions * 1e9, rel=3e-3)
    assert model.active_parameters == pytest.approx(active * 1e9, rel=3e-3)


def test_deepseek_v3() -> None:
    """MLA, shared and dense layers: 671B weights of which 37B act (arXiv 2412.19437)."""
    model = model_from_flags(
        {
            "num_layers": 61,
            "hidden_size": 7168,
            "num_attention_heads": 128,
            "multi_latent_attention": True,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_head_dim": 128,
            "qk_pos_emb_head_dim": 64,
            "v_head_dim": 128,
            "ffn_hidden_size": 18432,
            "swiglu": True,
            "num_experts": 256,
            "moe_router_topk": 8,
            "moe_ffn_hidden_size": 2048,
            "moe_shared_expert_intermediate_size": 2048,
            "moe_layer_freq": "([0]*3+[1]*58)",
            "vocab_size": 129280,
            "untie_embeddings_and_output_weights": True,
        }
    )
    assert (model.moe_layers, model.head_dim, model.value_head_dim) == (58, 192, 128)
    assert model.parameters == pytest.approx(671e9, rel=3e-3)
    assert model.active_parameters == pytest.approx(37.5e9, rel=1e-2)


def _tiny(**changes: object) -> Model:
    return model_from_flags(
        {
            "num-layers": 4,
            "hidden-size": 64,
            "num-attention-heads": 8,
            "vocab-size": 100,
            **changes,
        }
    )


def _pairs(length: int, window: int | None, causal: bool) -> int:
    """(query, key) pairs, enumerated."""
    return sum(
        (not causal or key <= query) and (window is None or not causal or query - key < window)
        for query in range(length)
        for key in range(length)
    )


@pytest.mark.parametrize("window", [None, 1, 3, 16, 50])
def test_causal_flops_are_those_of_the_pairs_left(window: int | None) -> None:
    length = 16
    flags = {} if window is None else {"window-size": f"{window - 1},0"}
    model = _tiny(**flags)
    plain = 6 * model.parameters * length
    attention = model_flops(model, length, causal=True) - plain
    expected = 12 * 4 * 8 * 8 * _pairs(length, window, causal=True)
    assert attention == pytest.approx(expected, rel=1e-12)


def test_full_attention_counts_every_key() -> None:
    model, length = _tiny(), 16
    assert model_flops(model, length, 3) == 3 * length * (
        6 * model.parameters + 12 * 4 * 64 * length
    )


def test_windows_take_turns() -> None:
    assert Window(4, skip=2).layers(42) == 21
    assert Window(4, skip=3).layers(4) == 3
    assert Window(4, skip=1).layers(4) == 0
    assert Window(4).layers(4) == 4
    listed = _tiny(**{"window-size": "3,0", "window-attn-skip-freq": "[1,1,1,0]"}).window
    assert listed is not None
    assert listed.layers(4) == 3
    with pytest.raises(SeqParError, match="5 layers need as many"):
        listed.layers(5)
    assert _tiny(**{"window-size": "(4095, 0)", "window-attn-skip-freq": 2}).window == Window(
        4096, 2
    )


def test_sizes() -> None:
    assert _tiny().ffn == 256
    assert _tiny(swiglu=True).ffn == 128
    assert _tiny(**{"group-query-attention": True, "num-query-groups": 2}).kv_heads == 2
    assert _tiny().tied
    gated = _tiny(swiglu=True).parameters - _tiny(swiglu=True, **{"ffn-hidden-size": 64}).parameters
    assert gated == 4 * 3 * 64 * 64
    moe = {"num-experts": 4, "moe-router-topk": 1}
    assert _tiny(**moe, **{"moe-layer-freq": 2}).moe_layers == 2
    assert _tiny(**moe, **{"moe-layer-freq": "[0,1]*2"}).moe_layers == 2
    assert _tiny(**moe).moe_layers == 4
    more = _tiny(**{"mtp-num-layers": 1})
    layer = (more.parameters - _tiny().parameters) - 2 * 64 * 64
    assert layer == 4 * 64 * 64 + 2 * 64 * 256
    assert model_flops(more, 8) - 6 * 8 * more.parameters == pytest.approx(
        8 * (6 * 100 * 64 + 12 * 5 * 64 * 8)
    )


def test_what_cannot_be_counted_is_said() -> None:
    with pytest.raises(UnsupportedError, match="--hybrid-layer-pattern"):
        _tiny(**{"hybrid-layer-pattern": "M*M-"})
    with pytest.raises(SeqParError, match="--vocab-size is not given"):
        model_from_flags({"num-layers": 1, "hidden-size": 8, "num-attention-heads": 1})
    with pytest.raises(SeqParError, match="--moe-layer-freq"):
        _tiny(**{"num-experts": 4, "moe-layer-freq": "[0,1]"})


def test_peaks() -> None:
    known = peak_of("NVIDIA H100 80GB HBM3", "bfloat16")
    assert known is not None
    assert known.value == pytest.approx(989.4e12)
    assert known.basis == "published"
    assert peak_of("NVIDIA A100-SXM4-80GB", "bfloat16").value == pytest.approx(312e12)
    assert peak_of("NVIDIA H100 80GB HBM3", "int8") is None
    assert peak_of("NVIDIA H100 PCIe", "bfloat16") is None, "slower than the SXM kind"
    assert peak_of("CPU x86_64, 2 cores", "float32") is None
