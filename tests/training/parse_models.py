# SPDX-License-Identifier: Apache-2.0
"""Parse and validate model files as a pretraining script would, without building a model.

    megatron-seqpar run tests/training/parse_models.py OUT.json ARGS -- 'MODEL.yaml ARGS' ...

ARGS are added to each model file's. `OUT.json` maps each 'MODEL.yaml ARGS' to the fields of
Megatron's model configuration that are numbers, texts or lists, or to the error that refused them,
under `error`. One process parses them all, as its imports take longer than the parsing.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The model configuration that arguments come to, and the folded size of the axis."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from megatron_seqpar.config import SeqParConfig
    from megatron_seqpar.integration import state

    state.set_config(SeqParConfig())  # the last file's settings would be this one's defaults
    sys.argv = [sys.argv[0], *arguments]
    args = parse_args()
    validate_args(args, {})
    model = gpt_config_from_args(args)
    fields = {**vars(model.transformer), **vars(model)}
    plain = {
        name: value
        for name, value in fields.items()
        if isinstance(value, (int, float, str, list, tuple)) or value is None
    }
    activation = model.transformer.activation_func
    return {**plain, "activation_func": activation.__name__, "softcap": args.seqpar_softcap}


if __name__ == "__main__":
    from megatron_seqpar.experiments.training import model_arguments

    target, *rest = sys.argv[1:]
    at = rest.index("--")
    found: dict[str, Any] = {}
    for wanted in rest[at + 1 :]:
        path, *more = shlex.split(wanted)
        try:
            found[wanted] = parsed([*model_arguments(Path(path)), *rest[:at], *more])
        except (Exception, SystemExit) as error:
            found[wanted] = {"error": f"{type(error).__name__}: {error}"}
    Path(target).write_text(json.dumps(found, default=str))
