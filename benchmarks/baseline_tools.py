# SPDX-License-Identifier: Apache-2.0
"""Calculon and llm-analysis, asked about a model and a layout in their own terms.

Both are run as they are, from checkouts that the caller names; nothing of them is changed but the
size of the GPU, which is set out of reach so that they tell how much a layout takes that they would
refuse. Whether it fits is then asked of the size that their own A100 80GB has.

What they cannot be told, and what stands in for it:

    Calculon        no embedding, LM head or loss: left out. A gated MLP: a plain one with as many
                    weights, 1.5 times as wide. Kernels that keep no attention scores: its
                    recomputation of attention, which keeps none either. bfloat16 gradients, norms'
                    kernels, no dropout: not said. Ranks lie as Megatron lays them: tensor-parallel
                    ranks side by side, then data-parallel ones, then stages.
    llm-analysis    no pipeline bubble, no waiting for data parallelism. One matrix is embedding
                    and LM head. Norms in plain torch: norms that keep fp32. Efficiencies: what its
                    README takes if one has to assume, 0.5 of peak FLOP/s and 0.9 of the memory's
                    bandwidth.

Fused softmax and plain torch attention are the same to both: scores are kept.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_seqpar.mfu import Model
from megatron_seqpar.planner import Layout

NODE = 8  # GPUs of a DGX
OUT_OF_REACH = 10**6  # GiB
FLASH = ("flash1", "flash2")


@dataclass(frozen=True)
class Answer:
    """What a tool says of a layout: bytes of a rank and seconds of a step."""

    memory: float
    time: float


class Tool(Protocol):
    """A planner that is not ours.

    name: in tables. version, commit: of the checkout. capacity: bytes of its A100 80GB.
    """

    name: str
    version: str
    commit: str
    capacity: float

    def ask(self, model: Model, layout: Layout) -> Answer:
        """Its prediction. Raises whatever it raises for a layout that it does not know."""
        ...


def calculon_application(model: Model, length: int) -> dict[str, int]:
    """Calculon's description of a model; `length` is the tokens of a sequence."""
    return {
        "hidden": model.hidden,
        "feedforward": model.ffn * model.mlp_matrices // 2,
        "seq_size": length,
        "attn_heads": model.query_heads,
        "attn_size": model.head_dim,
        "num_blocks": model.layers,
    }


def calculon_execution(layout: Layout) -> dict[str, Any]:
    """Calculon's description of a layout."""
    recompute = "attn_only" if layout.kernel in FLASH else "none"
    if layout.recompute == "full":
        recompute = "full"
    beside = layout.tp * layout.dp  # ranks up to the next stage
    return {
        "num_procs": layout.ranks,
        "tensor_par": layout.tp,
        "pipeline_par": layout.pp,
        "data_par": layout.dp,
        "tensor_par_net": 0 if layout.tp <= NODE else 1,
        "pipeline_par_net": 0 if beside * layout.pp <= NODE else 1,
        "data_par_net": 0 if beside <= NODE else 1,
        "batch_size": layout.global_batch,
        "microbatch_size": layout.micro_batch,
        "datatype": "float16",  # as large and as fast as bfloat16, which its A100 does not list
        "fused_activation": False,
        "attention_type": "multihead",
        "activation_recompute": recompute,
        "pipeline_interleaving": layout.vpp,
        "optimizer_sharding": layout.zero >= 1 and layout.dp > 1,
        "tensor_par_comm_type": "rs_ag" if layout.tp_sp and layout.tp > 1 else "ar",
        "tensor_par_overlap": "none",
        "seq_par_ag_redo": False,
        "data_par_overlap": layout.overlap_dp and layout.dp > 1,
        "weight_offload": False,
        "activations_offload": False,
        "optimizer_offload": False,
        "training": True,
    }


def llm_analysis_model(model: Model, length: int) -> dict[str, Any]:
    """llm-analysis' `ModelConfig` of a model; `length` is the tokens of a sequence."""
    return {
        "name": "row",
        "num_layers": model.layers,
        "n_head": model.query_heads,
        "hidden_dim": model.hidden,
        "vocab_size": model.vocab,
        "max_seq_len": length,
        "num_key_value_heads": model.kv_heads,
        "ffn_embed_dim": model.ffn,
        "mlp_gated_linear_units": model.gated,
    }


def llm_analysis_parallelism(layout: Layout) -> dict[str, int]:
    """llm-analysis' `ParallelismConfig` of a layout."""
    return {
        "tp_size": layout.tp,
        "pp_size": layout.pp,
        "dp_size": layout.dp,
        "sp_size": layout.tp if layout.tp_sp else 1,
    }


def llm_analysis_training(layout: Layout) -> dict[str, Any]:
    """Arguments of llm-analysis' `training` for a layout, its enumerations as numbers."""
    return {
        "batch_size_per_gpu": layout.micro_batch,
        "global_batch_size": layout.global_batch,
        "seq_len": layout.sequence_length,
        "activation_recomputation": 4 if layout.recompute == "full" else 0,
        "ds_zero": layout.zero,
        "layernorm_dtype_bytes": layout.element if layout.fused_norm else 4,
        # the state of Adam does not follow it: what it sizes is gradients
        "master_weights_dtype_bytes": layout.gradient_bytes,
        "flash_attn": layout.kernel in FLASH,
    }


class Calculon:
    """Calculon from a checkout, with its system a100_80g."""

    name = "Calculon"

    def __init__(self, folder: Path) -> None:
        self.version, self.commit = _load("calculon", folder), _commit(folder)
        self._llm = importlib.import_module("calculon.llm").Llm
        self._system = importlib.import_module("calculon.system").System
        self._description = json.loads((folder / "systems" / "a100_80g.json").read_text())
        memory = self._description["mem1"]
        self.capacity = memory["GiB"] * 2**30
        memory["GiB"] = OUT_OF_REACH
        self._log = logging.getLogger("calculon")

    def ask(self, model: Model, layout: Layout) -> Answer:
        """Its prediction of one layout."""
        application = calculon_application(model, layout.sequence_length)
        llm = self._llm(self._llm.Application(application), self._log)
        system = self._system(self._description)
        llm.compile(system, self._llm.Execution.from_json(calculon_execution(layout)))
        llm.run(system)
        return Answer(llm.get_mem_tier1_cap_req(), llm.get_total_time())


class LlmAnalysis:
    """llm-analysis from a checkout, with its GPU a100-sxm-80gb."""

    name = "llm-analysis"
    flops_efficiency = 0.5
    memory_efficiency = 0.9

    def __init__(self, folder: Path) -> None:
        self.version, self.commit = _load("llm_analysis", folder), _commit(folder)
        self._analysis = importlib.import_module("llm_analysis.analysis")
        self._config = importlib.import_module("llm_analysis.config")
        logging.getLogger("__name__").setLevel(logging.CRITICAL)  # its logger is called that
        gpu = self._config.get_gpu_config_by_name("a100-sxm-80gb")
        self.capacity = gpu.mem_per_GPU_in_GB * 2**30  # as it reckons
        self._gpu = replace(gpu, mem_per_GPU_in_GB=OUT_OF_REACH)

    def ask(self, model: Model, layout: Layout) -> Answer:
        """Its prediction of one layout."""
        arguments = llm_analysis_training(layout)
        for name, kind in (
            ("activation_recomputation", self._analysis.ActivationRecomputation),
            ("ds_zero", self._analysis.DSZeRO),
        ):
            arguments[name] = kind(arguments[name])
        with contextlib.redirect_stdout(io.StringIO()):
            found = self._analysis.LLMAnalysis(
                self._config.ModelConfig(**llm_analysis_model(model, layout.sequence_length)),
                self._gpu,
                self._config.get_dtype_config_by_name("w16a16e16"),
                self._config.ParallelismConfig(**llm_analysis_parallelism(layout)),
                flops_efficiency=self.flops_efficiency,
                hbm_memory_efficiency=self.memory_efficiency,
            ).training(**arguments)
        return Answer(found["estimated_peak_memory_per_gpu"], found["latency_per_iter"])


def _load(package: str, folder: Path) -> str:
    """Make a checkout's package importable; its version, where it says one."""
    sys.path.insert(0, str(folder))
    module = importlib.import_module(package)
    place = getattr(module, "__file__", None) or ""
    if folder.resolve() not in Path(place).resolve().parents:
        raise SystemExit(f"{package} was found in {place}, not in {folder}")
    known = getattr(module, "__version__", None)
    if known is None:
        project = folder / "pyproject.toml"
        lines = project.read_text().splitlines() if project.exists() else []
        known = next((line.split('"')[1] for line in lines if line.startswith("version =")), "")
    return str(known)


def _commit(folder: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
