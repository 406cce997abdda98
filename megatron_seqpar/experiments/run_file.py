# SPDX-License-Identifier: Apache-2.0
"""The file of a pretraining run: model, machines, parallel layout, batch and data in one place.

    megatron-seqpar run --config configs/runs/pretrain-llama3-8b-128k.yaml --dry-run

Everything in it becomes a flag of Megatron or of the plugin; what the file's own keys do not say,
`arguments` does, and arguments on the command line win over both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator

from megatron_seqpar.errors import SeqParError
from megatron_seqpar.experiments.layout import RECOMPUTE, STOCK, ZERO, Layout
from megatron_seqpar.experiments.setting import Section, beside, read_mapping, told
from megatron_seqpar.experiments.training import flags
from megatron_seqpar.mfu import Model, model_from_flags, read_flags
from megatron_seqpar.shipped import model_file, model_names

Kind = Literal["pretrain", "compare", "sweep"]
STDLIB = "stdlib"
MOCK = "mock"


class LayoutSection(Section):
    """`layout:`; what the sizes leave of the ranks is DP.

    Attributes:
        tp, sp, pp, vpp, ep: sizes of the axes; vpp are virtual stages of a pipeline rank.
        tp_sp: Megatron's --sequence-parallel.
        zero: 0 or 1; 1 is Megatron's distributed optimizer.
        recompute: none, selective, full, or one of the plugin's.
        mlp_chunks, loss_chunks: off, auto or a number.
        schedule: of attention over SP.
        kernel: an attention kernel of the plugin; auto takes the best for the device.
    """

    tp: int = Field(default=1, ge=1)
    sp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    vpp: int = Field(default=1, ge=1)
    ep: int = Field(default=1, ge=1)
    tp_sp: bool = False
    zero: int = 0
    recompute: str = "none"
    mlp_chunks: str = "off"
    loss_chunks: str = "off"
    schedule: str = "auto"
    kernel: str = "auto"

    @field_validator("zero")
    @classmethod
    def _stage(cls, value: int) -> int:
        if value not in ZERO or value > 1:
            raise ValueError("the accepted values are 0 and 1: FSDP does not go with the axis")
        return value

    @field_validator("recompute")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in RECOMPUTE:
            raise ValueError(f"the accepted values are {', '.join(RECOMPUTE)}")
        return value

    @field_validator("mlp_chunks", "loss_chunks", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return "off" if value is False else str(value)  # YAML reads a bare off as false


class DataSection(Section):
    """`data:` of a corpus on disk, in Megatron's indexed format.

    Attributes:
        path: prefix of the .bin and .idx files, as --data-path takes it.
        tokenizer_type, tokenizer_model: the tokenizer that it was made with.
        split: shares of training, validation and test.
        cache: folder for index files, on storage that all nodes share.
    """

    path: str
    tokenizer_type: str
    tokenizer_model: str | None = None
    split: str = "99,1,0"
    cache: str | None = None


def _which(value: Any) -> str:
    return "corpus" if isinstance(value, (dict, DataSection)) else "name"


Data = Annotated[
    Annotated[Literal["stdlib", "mock"], Tag("name")] | Annotated[DataSection, Tag("corpus")],
    Discriminator(_which),
]


class RunConfig(Section):
    """A pretraining run.

    Attributes:
        model: a name in configs/models, or a file of flags beside this one or in the current
            folder; `changes` are laid over it.
        nodes, nproc_per_node: how many machines, and processes (GPUs) of each.
        device: auto, cpu or cuda.
        cluster: what `auto` schedules reckon with and the planner estimates for; a name in
            configs/clusters.
        seq_length: tokens of a sequence.
        global_batch_size, micro_batch_size: in sequences.
        train_iters: steps.
        data: `stdlib` (bytes of Python's own library, made before the run starts), `mock`
            (Megatron's made-up tokens), or a corpus on disk.
        arguments: more of Megatron's and the plugin's flags.
        script: pretraining script; default: the scripts/pretrain_gpt.py of this project.
        environment: variables of the processes.
    """

    model: Path
    changes: dict[str, Any] = Field(default_factory=dict)
    nodes: int = Field(default=1, ge=1)
    nproc_per_node: int = Field(ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cluster: str | None = None
    layout: LayoutSection = LayoutSection()
    seq_length: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(default=1, ge=1)
    train_iters: int = Field(ge=1)
    data: Data
    arguments: dict[str, Any] = Field(default_factory=dict)
    script: Path | None = None
    environment: dict[str, str] = Field(default_factory=dict)

    @field_validator("environment", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return {k: str(v) for k, v in value.items()} if isinstance(value, dict) else value

    def model_flags(self) -> dict[str, Any]:
        """Megatron's flags of the model, changes included."""
        return {**read_flags(self.model), **self.changes}

    def sizes(self, vocabulary: int) -> Model:
        """The model's sizes; `vocabulary` counts where the model names none."""
        return model_from_flags({"vocab-size": vocabulary, **self.model_flags()}, str(self.model))

    def laid_out(self, ranks: int) -> Layout:
        """The parallel layout over `ranks` processes."""
        section = self.layout
        return Layout(
            ranks,
            tp=section.tp,
            sp=section.sp,
            pp=section.pp,
            ep=section.ep,
            vpp=section.vpp,
            tp_sp=section.tp_sp,
            micro_batch=self.micro_batch_size,
            zero=section.zero,
            recompute=section.recompute,
            mlp_chunks=section.mlp_chunks,
            loss_chunks=section.loss_chunks,
            schedule=section.schedule,
            kernel=STOCK if section.kernel == "auto" else section.kernel,  # no flag: the default
        )

    def script_arguments(self, ranks: int, data: list[str]) -> list[str]:
        """Arguments of the script for `ranks` processes.

        data: those that `data:` comes to, tokenizer among them. Raises SeqParError for a layout
        that these ranks, this model or this batch do not allow.
        """
        layout = self.laid_out(ranks)
        why = layout.impossible(self.sizes(vocabulary=256), self.global_batch_size)
        if why:
            raise SeqParError(f"layout of {ranks} ranks: {why}")
        pairs: dict[str, Any] = {
            "seq-length": self.seq_length,
            "max-position-embeddings": self.seq_length,
            "micro-batch-size": self.micro_batch_size,
            "global-batch-size": self.global_batch_size,
            "train-iters": self.train_iters,
        }
        if self.cluster is not None:
            pairs["seqpar-cluster"] = self.cluster
        return [
            *flags(self.model_flags()),
            *layout.arguments(),
            *flags(pairs),
            *data,
            *flags(self.arguments),
        ]


def data_arguments(section: DataSection) -> list[str]:
    """Megatron's arguments for a corpus on disk."""
    words = ["--data-path", *section.path.split(), "--tokenizer-type", section.tokenizer_type]
    if section.tokenizer_model is not None:
        words += ["--tokenizer-model", section.tokenizer_model]
    if section.cache is not None:
        words += ["--data-cache-path", section.cache]
    return [*words, "--split", section.split]


def kind_of(path: Path) -> Kind:
    """Which command a file of configs/runs is for, by the keys that only that kind has."""
    content = read_mapping(path)
    if "nproc-per-node" in content:
        return "pretrain"
    return "sweep" if {"grid", "layouts"} & set(content) else "compare"


def read_run(path: Path) -> RunConfig:
    """The pretraining run of a file. SeqParError names the file, the key and what is wrong."""
    try:
        run = RunConfig.model_validate(read_mapping(path))
    except ValidationError as error:
        raise SeqParError("\n".join(told(path, entry) for entry in error.errors())) from None
    named = str(run.model) in model_names()
    found = {"model": model_file(str(run.model)) if named else beside(path, run.model, "model")}
    if run.script is not None:
        found["script"] = beside(path, run.script, "script")
    return run.model_copy(update=found)
