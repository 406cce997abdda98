# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/megatron.md, made from the code they describe.

    python -m megatron_seqpar.integration.tables docs/megatron.md

rewrites them in place; a test fails when the page and the code differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_seqpar.integration.refusals import REFUSALS, Refusal
from megatron_seqpar.integration.refusals_by_setting import BY_SETTING


def patch_point_table() -> str:
    """Every replaced symbol, the versions it was checked on, and why: Markdown rows."""
    from megatron_seqpar.integration.patch_points import PATCH_POINTS

    rows = ["| symbol | megatron-core | why |", "|---|---|---|"]
    for point in PATCH_POINTS:
        rows.append(f"| `{point.symbol}` | {', '.join(point.versions)} | {point.why} |")
    return "\n".join(rows) + "\n"


def refusal_table(refused: tuple[Refusal, ...]) -> str:
    """The refused combinations and what to use instead: Markdown rows."""
    rows = ["| refused | because | instead |", "|---|---|---|"]
    for row in refused:
        reason = row.reason.replace("|", "\\|")
        rows.append(f"| `{row.flag}` | {reason} | {row.alternative} |")
    return "\n".join(rows) + "\n"


def rewrite(text: str) -> str:
    """`text` with the tables between its `<!-- name: begin -->` and `end` marks made anew."""
    tables = {
        "patch-points": patch_point_table(),
        "refusals": refusal_table(REFUSALS),
    }
    for setting, refused in BY_SETTING.items():
        tables[f"{setting.replace('_', '-')}-refusals"] = refusal_table(refused)
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"the page has no marks for the table {name!r}")
        text = before + begin + table + end + after
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(rewrite(page.read_text()))
