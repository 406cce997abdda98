# SPDX-License-Identifier: Apache-2.0
"""Run a pretraining script with `--sft` on one token a byte and no further libraries.

    megatron-seqpar run --nproc N tests/integration/sft_text.py SCRIPT --sft ARGS

Stock `SFTDataset` packs the conversations; only reading a JSON-lines file and turning a
conversation into tokens, for which it wants `datasets` and a tokenizer of `transformers`, are
replaced. The assistant's bytes count in the loss, everything else is prompt.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

PROMPT = -100  # the stock dataset's mark of targets that do not count


def read(self: Any, dataset_path: str) -> None:
    """In place of `SFTLowLevelDataset.__init__`."""
    with Path(dataset_path).open() as lines:
        self.dataset = [json.loads(line) for line in lines]


def tokenize_conversation(
    self: Any, conversation: list[dict[str, str]], return_target: bool, add_generation_prompt: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the tokenizer's: bytes, and the same with the prompt marked."""
    tokens: list[int] = []
    targets: list[int] = []
    for message in conversation:
        content = message["content"].encode()
        tokens += content
        targets += content if message["role"] == "assistant" else [PROMPT] * len(content)
    return torch.tensor(tokens), torch.tensor(targets)


def install() -> None:
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText
    from megatron.training.datasets.sft_dataset import SFTLowLevelDataset

    SFTLowLevelDataset.__init__ = read
    MegatronTokenizerText.tokenize_conversation = tokenize_conversation


if __name__ == "__main__":
    script, *rest = sys.argv[1:]
    install()
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).absolute().parent))
    runpy.run_path(script, run_name="__main__")
