# SPDX-License-Identifier: Apache-2.0
"""The parts of docs/ that are made from code and result files.

    python scripts/make_docs.py            rewrite them in place
    python scripts/make_docs.py --check    change nothing; fail where a page is out of date

Made are the flags, the commands, what is refused, the patch points, and the home page's figures.
A part stands between `<!-- name: begin -->` and `<!-- name: end -->`; all around it is written by
hand. Tests and `scripts/docs.sh` fail when a page differs from what the code says.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_seqpar.config import SeqParConfig
from megatron_seqpar.integration import refusals
from megatron_seqpar.integration.refusals import REFUSALS, Refusal
from megatron_seqpar.integration.refusals_by_setting import BY_SETTING
from megatron_seqpar.integration.refusals_mlp import PIECES_REFUSALS

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
RESULTS = REPOSITORY / "benchmarks" / "results"

TOPICS: dict[str, tuple[str, ...]] = {
    "The axis and its attention": (
        "sequence_parallel_size", "schedule", "token_layout", "mask", "softcap", "kernel",
        "overlap",
    ),
    "Memory": ("recompute", "mlp_chunks", "loss_chunks", "memory_budget", "offload"),
    "The machine": ("node_size", "cluster", "peak_tflops"),
    "Measurement": ("report", "summary", "telemetry_interval", "trace", "trace_steps"),
}  # fmt: skip
"""Headings of the flags' page, with the fields of `SeqParConfig` under each."""

SETTINGS: dict[str, tuple[Refusal, ...]] = {
    "SP > 1": REFUSALS,
    "recompute": BY_SETTING["recompute"],
    "recompute of MLPs": PIECES_REFUSALS,
    "MLP pieces": BY_SETTING["mlp_chunks"],
    "loss pieces": BY_SETTING["loss_chunks"],
    "mask": BY_SETTING["mask"],
    "zigzag tokens": BY_SETTING["token_layout"],
}
"""What of ours is on -> the table that then applies."""

_ALWAYS = Refusal.__dataclass_fields__["when"].default


def flags() -> str:
    """Every flag of the plugin by topic: default, values, meaning, what it is not combined with.

    Raises `ValueError` when a field of `SeqParConfig` has no topic.
    """
    fields = {field.name: field for field in dataclasses.fields(SeqParConfig)}
    listed = [name for names in TOPICS.values() for name in names]
    if sorted(listed) != sorted(fields):
        raise ValueError(f"TOPICS and SeqParConfig differ in {set(listed) ^ set(fields)}")
    lines: list[str] = []
    for topic, names in TOPICS.items():
        lines += [f"## {topic}", ""]
        for name in names:
            lines += _flag(fields[name])
    return "\n".join(lines) + "\n"


def _flag(field: Any) -> list[str]:
    meta = field.metadata
    facts = [f"default: {_default(field)}"]
    if meta["choices"] is not None:
        facts.append("values: " + ", ".join(f"`{value}`" for value in meta["choices"]))
    elif meta["metavar"] is not None:
        facts.append(f"value: `{meta['metavar']}`")
    given = "False" if meta["negated"] else "..."
    facts.append(f"in Python: `SeqParConfig({field.name}={given})`")
    lines = [f"### `{meta['flag']}`", "", meta["help"], "", *(f"- {fact}" for fact in facts)]
    refused = BY_SETTING.get(field.name)
    if refused:
        other = ", ".join(f"`{row.flag}`" for row in refused)
        lines.append(
            f"- refused with {other}: [what to use instead](composition.md#what-is-refused)"
        )
    return [*lines, ""]


def _default(field: Any) -> str:
    if field.metadata["negated"]:
        return "not given"
    if field.default is None:
        return "worked out, as said above" if field.name in _WORKED_OUT else "none"
    return f"`{field.default}`"


_WORKED_OUT = ("memory_budget", "node_size", "cluster", "peak_tflops")


def commands() -> str:
    """The reference of the command line, by typer's own writer, one level of headings lower."""
    writer = [sys.executable, "-m", "typer", "megatron_seqpar.cli", "utils", "docs"]
    done = subprocess.run(
        [*writer, "--name", "megatron-seqpar"], capture_output=True, text=True, check=True
    )
    _, _, text = done.stdout.partition("\n")  # the page has a title of its own
    for escaped, sign in (("&#x27;", "'"), ("&quot;", '"')):
        text = text.replace(escaped, sign)
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # cut short; sections follow
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def refused() -> str:
    """Every flag that something of ours refuses, what refuses it, and what to use instead."""
    found: dict[str, dict[str, Refusal]] = {}
    for setting, table in SETTINGS.items():
        for row in table:
            found.setdefault(row.flag, {})[setting] = row
    lines = ["| flag | refused with | instead |", "|---|---|---|"]
    for flag in sorted(found, key=lambda text: text.lstrip("-").lower()):
        by_limit: dict[str, list[str]] = {}
        for setting, row in found[flag].items():
            by_limit.setdefault(_limits(row), []).append(setting)
        with_ = "; ".join(", ".join(settings) + limit for limit, settings in by_limit.items())
        instead = dict.fromkeys(row.alternative for row in found[flag].values())
        lines.append(f"| `{flag}` | {with_} | {'; or: '.join(instead)} |")
    return "\n".join(lines) + "\n"


def _limits(row: Refusal) -> str:
    if row.when is not _ALWAYS:
        return " (with other flags)"
    return "" if row.applies is refusals.is_set else " (some values)"


COMPARISONS = {
    "compare-small": "one machine",
    "compare-slow-link": "two hosts joined by 1 Gb/s",
}
"""Result file of a comparison -> where it ran, as the home page says it."""


def measured() -> str:
    """TP against SP on the same attention kernel, as ratios, from the committed result files."""
    lines = [
        "| where | tokens | against SP=2 | time / SP's | bytes sent / SP's |",
        "|---|--:|---|--:|--:|",
    ]
    for name, where in COMPARISONS.items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for tokens, rows in result["by_length"].items():
            (ours,) = [row for row in rows if row["label"] == "SP=2"]
            for row in rows:
                if row["layout"]["tp"] == 2 and row["attention"] == ours["attention"]:
                    time = row["step_time_s"] / ours["step_time_s"]
                    sent = row["bytes_sent_per_step"] / ours["bytes_sent_per_step"]
                    lines.append(
                        f"| {where} | {int(tokens):,} | {row['label']} | {time:.2f} | {sent:.1f} |"
                    )
    return "\n".join(lines) + "\n"


def longest() -> str:
    """The longest sequence that trains in the same memory, by what saves it."""
    ways = json.loads((RESULTS / "max_length.json").read_text(encoding="utf-8"))["ways"]
    shown = {
        "stock": "stock attention",
        "stock, full recompute": "stock attention, full recomputation",
        "none": "this attention kernel",
        "full recompute": "this attention kernel, full recomputation",
        "attention-output + mini-sequence": (
            "this attention kernel, `--seqpar-recompute attention-output`, MLPs and loss in pieces"
        ),
    }
    lines = ["| one rank with | tokens | of stock |", "|---|--:|--:|"]
    for name, text in shown.items():
        tokens = ways[name]["longest"]
        lines.append(f"| {text} | {tokens:,} | {tokens / ways['stock']['longest']:.1f} |")
    return "\n".join(lines) + "\n"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "index.md": {"measured": measured, "longest": longest},
    "flags.md": {"flags": flags},
    "commands.md": {"commands": commands},
    "composition.md": {"refused": refused},
}

ALL = (*PAGES, "megatron.md")  # whose tables are made by integration/tables.py


def made_anew(page: str, text: str) -> str:
    """`text` of docs/`page` with its generated parts as the code has them now.

    Raises `ValueError` when the marks of a part are not there.
    """
    if page == "megatron.md":
        from megatron_seqpar.integration import tables  # imports Megatron

        return tables.rewrite(text)
    for name, make in PAGES[page].items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"docs/{page} has no marks for the part {name!r}")
        text = before + begin + make() + end + after
    return text


def main(arguments: list[str]) -> int:
    """Rewrite the pages, or with --check name those that are out of date; the exit status."""
    stale = []
    for page in ALL:
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        new = made_anew(page, text)
        if new != text:
            stale.append(page)
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    if "--check" in arguments and stale:
        print(f"out of date: {', '.join(stale)}; run: python scripts/make_docs.py", file=sys.stderr)
        return 1
    print(f"rewritten: {', '.join(stale) or 'nothing, all is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
