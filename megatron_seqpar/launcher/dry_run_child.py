# SPDX-License-Identifier: Apache-2.0
"""The process behind `dry_run`: runs scripts until Megatron's arguments are parsed and validated.

Reads its orders from stdin and writes an answer for each to the file that they name.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

from megatron_seqpar import cpu_runtime
from megatron_seqpar.errors import SeqParError

from .argument_errors import with_hint
from .dataset_helpers import use_built_helpers
from .failures import explain
from .script import enter_folder_of, existing_script, install_plugin

HOPPER = (9, 0)
_PLAIN = (bool, int, float, str, type(None))
_ENGINE = re.compile(r"\bTE\b|transformer.?engine", re.IGNORECASE)
_OF_THE_CHECK = ("rank", "seqpar_folded")  # what says nothing of the run


class _Parsed(BaseException):
    """Megatron's arguments are complete. No Exception, so that no script catches it."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.namespace = args  # `args` is an exception's own


def main() -> None:
    """Check every order of stdin and write the answers."""
    asked = json.load(sys.stdin)
    orders = asked["orders"]
    _be_rank_zero(orders[0])
    _choose_device(asked["device"])
    _no_process_groups()
    argparse.ArgumentParser.error = _refused  # type: ignore[method-assign, assignment]
    use_built_helpers()
    enter_folder_of(existing_script(orders[0]["script"]))  # it may be a Megatron-LM checkout's
    if asked["plugin"]:
        install_plugin()
        from megatron_seqpar.integration import fused_parts

        fused_parts.check = lambda args: None  # this machine need not have what the run's has
    _stop_after_parsing()
    defaults = _defaults()
    answers = [_answer(order, defaults, plugin=asked["plugin"]) for order in orders]
    Path(asked["answer"]).write_text(json.dumps(answers), encoding="utf-8")


def _be_rank_zero(order: dict[str, Any]) -> None:
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE=str(order["ranks"]),
        LOCAL_WORLD_SIZE=str(order["per_node"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )


def _choose_device(device: str) -> None:
    """The CPU runtime, or a GPU; where the run is for one and this machine has none, in name only.

    Megatron asks the GPU for its generation while it validates arguments.
    """
    cpu_runtime.share_cores()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as `run_script` does
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        cpu_runtime.activate()
    elif not torch.cuda.is_available():
        from megatron_seqpar.cpu_runtime import presence
        from megatron_seqpar.cpu_runtime.registry import replace

        presence.cuda_presence()
        properties = torch.cuda.get_device_properties(0)
        properties.major, properties.minor = HOPPER
        replace(
            torch.cuda,
            get_device_capability=lambda device=None: HOPPER,
            get_device_properties=lambda device=None: properties,
        )


def _no_process_groups() -> None:
    """A script that starts its groups before Megatron has parsed has gone too far."""
    import torch.distributed

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise SeqParError(
            "--dry-run: the script starts process groups before Megatron parses its arguments, so "
            "nothing of it can be checked; use --no-check for the command alone"
        )

    torch.distributed.init_process_group = refused


def _refused(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise SeqParError(with_hint(parser, message))


def _stop_after_parsing() -> None:
    """Megatron keeps validated arguments in one place, next in every version: stop there."""
    from megatron.core import package_info

    from megatron_seqpar.integration.patching import Patcher, PatchPoint

    def build(original: Any) -> Any:
        def set_global_variables(args: Any, *rest: Any, **kwargs: Any) -> NoReturn:
            raise _Parsed(args)

        return set_global_variables

    version = package_info.__version__
    point = PatchPoint(
        "megatron.training.global_vars.set_global_variables",
        build,
        (".".join(version.split(".")[:2]),),
        "the check ends here",
    )
    importlib.import_module("megatron.training.initialize")  # copies that it took are patched too
    Patcher([point], version).apply()


def _defaults() -> dict[str, Any]:
    """What Megatron's parser and the plugin's flags have where nothing is given."""
    from megatron.training import arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return {action.dest: action.default for action in parser._actions}


def _answer(order: dict[str, Any], defaults: dict[str, Any], *, plugin: bool) -> dict[str, Any]:
    """Run one script to where it is stopped."""
    _be_rank_zero(order)
    if plugin:
        from megatron_seqpar.config import SeqParConfig
        from megatron_seqpar.integration import state

        state.set_config(SeqParConfig())  # the last order's would be this one's defaults
    answer: dict[str, Any] = {"error": None, "resolved": {}, "said": [], "notes": []}
    script = existing_script(order["script"])
    sys.argv = [order["script"], *order["arguments"]]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            try:
                runpy.run_path(str(script), run_name="__main__")
            except _Parsed as parsed:
                answer["resolved"] = _resolved(parsed.namespace, defaults)
                answer["notes"] = _missing_here(parsed.namespace)
                answer["notes"] += _build_config(parsed.namespace)
                _check_warmup(parsed.namespace)
            else:
                answer["error"] = (
                    "--dry-run: the script ended without parsing Megatron's arguments, so nothing "
                    "of it was checked; use --no-check for the command alone"
                )
    except SystemExit as leaving:
        answer["error"] = f"the script left with status {leaving.code}"
    except Exception as error:
        answer["error"] = explain(error) or f"{type(error).__name__}: {error}"
    answer["said"] = [
        line for line in printed.getvalue().splitlines() if line.startswith("seqpar: ")
    ]
    return answer


def _build_config(args: Any) -> list[str]:
    """Megatron's model configuration, whose own checks come after those of the arguments.

    What it refuses for want of Transformer Engine, where the run has it and this machine has not,
    is a note.
    """
    for name in ("megatron.training.argument_utils", "megatron.training.arguments"):
        if importlib.util.find_spec(name) is None:
            continue
        build = getattr(importlib.import_module(name), "core_transformer_config_from_args", None)
        if build is None:
            continue
        lacking = _lacks_engine(args)
        try:
            # the one thing of the engine that is on by default
            build(argparse.Namespace(**{**vars(args), "apply_rope_fusion": False})
                  if lacking else args)  # fmt: skip
        except (ImportError, AssertionError, ValueError) as error:
            if not (lacking and _ENGINE.search(str(error))):
                raise
            return [f"not checked for want of Transformer Engine: {error}"]
        return []
    return []


def _check_warmup(args: Any) -> None:
    """Megatron's scheduler asserts it, without a word, once the model is built."""
    steps = getattr(args, "lr_decay_iters", None) or getattr(args, "train_iters", None)
    warmup = getattr(args, "lr_warmup_iters", None) or 0
    if steps is not None and warmup >= steps:
        raise SeqParError(
            f"--lr-warmup-iters {warmup}: the learning rate is still rising when its {steps} steps "
            "(--lr-decay-iters, else --train-iters) are over; use fewer"
        )


def _lacks_engine(args: Any) -> bool:
    """Whether layers are Transformer Engine's, which is not installed here."""
    wanted = getattr(args, "transformer_impl", None) == "transformer_engine"
    return wanted and importlib.util.find_spec("transformer_engine") is None


def _resolved(args: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are not at their defaults; what is no number or text by its name."""
    return {
        name: value if isinstance(value, _PLAIN) else str(value)
        for name, value in sorted(vars(args).items())
        if (name not in defaults or defaults[name] != value)
        and not name.startswith("_")
        and name not in _OF_THE_CHECK
    }


def _missing_here(args: Any) -> list[str]:
    """Files and packages that the run names and this machine does not have."""
    notes = []
    for prefix in getattr(args, "data_path", None) or []:
        if not _is_number(prefix) and not Path(f"{prefix}.idx").is_file():
            notes.append(f"--data-path {prefix}: there is no {prefix}.idx here")
    if _lacks_engine(args):
        notes.append(
            "--transformer-impl transformer_engine: Transformer Engine is not installed here"
        )
    load = getattr(args, "load", None)
    if load is not None and not Path(load).is_dir():
        notes.append(f"--load {load}: there is no such folder here; the run would start afresh")
    return notes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
