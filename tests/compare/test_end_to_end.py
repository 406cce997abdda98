# SPDX-License-Identifier: Apache-2.0
"""`megatron-seqpar compare` for real: killed, resumed by two at once, every row run once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILE = f"""
model: {CONFIGS / "models" / "quickstart.yaml"}
data: text.jsonl
seq-length: 128
steps: 2
device: cpu
ways:
  - {{ranks: 1}}
  - {{sp: 2}}
  - {{tp: 2, cp: 2}}
"""


def command(folder: Path) -> list[str]:
    words = [sys.executable, "-m", "megatron_seqpar", "compare", str(folder / "c.yaml")]
    return [*words, "--output", str(folder / "out")]


def rows(folder: Path) -> dict[str, dict]:
    found = sorted((folder / "out" / "rows").glob("*.json"))
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in found}


def has_finished_a_row(folder: Path) -> bool:
    return (folder / "out" / "rows").is_dir() and any((folder / "out" / "rows").glob("[!.]*.json"))


@pytest.mark.timeout(600)
def test_kill_resume_and_two_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text(FILE, encoding="utf-8")
    text = json.dumps({"text": "a long text of many words. " * 400})
    (tmp_path / "text.jsonl").write_text(text + "\n", encoding="utf-8")

    with (tmp_path / "killed.log").open("w") as log:
        killed = subprocess.Popen(command(tmp_path), stdout=log, stderr=log)
        while killed.poll() is None and not has_finished_a_row(tmp_path):
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    before = rows(tmp_path)
    assert [row["status"] for row in before.values()] == ["ok"], (
        tmp_path / "killed.log"
    ).read_text()

    both = [
        subprocess.Popen(
            command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    after = rows(tmp_path)
    assert {name: after[name] for name in before} == before, "what was whole is kept as it was"
    assert sum(text.count("stored before") for text in said) == 3, "one row was run, by one of two"
    assert all("not run: stock CP needs Transformer Engine" in text for text in said)

    result = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    one, two, refused = result["by_length"]["128"]
    assert one["reference"]
    assert two["loss_difference"] < 1e-5
    assert len(two["losses"]) == 2
    assert two["bytes_sent_per_step"] > one["bytes_sent_per_step"] == 0
    assert (refused["status"], refused["refused"]) == ("error", True)
    assert one["versions"]["torch"]
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000
    assert sorted(os.listdir(tmp_path / "out" / "rows")) == sorted(after), "nothing in parts"
    assert len(after) == 2
