# SPDX-License-Identifier: Apache-2.0
"""Rows on disk: whole or not there, and one writer at a time."""

import subprocess
import sys

import pytest

from megatron_seqpar.experiments.run_all import run_job
from megatron_seqpar.experiments.store import Store, slug, write_whole
from tests.experiments.scripts import REPORT, job

HOLD = """
import pathlib, sys, time
from megatron_seqpar.experiments.store import Store
with Store(pathlib.Path(sys.argv[1])).turn(print):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_row_is_found_by_name_and_key(tmp_path):
    store = Store(tmp_path)
    store.save("TP=2, stock", "k" * 20, {"status": "ok"})
    assert store.find("TP=2, stock", "k" * 20)["status"] == "ok"
    assert store.find("TP=2, stock", "other") is None
    same_start = "k" * 10 + "x" * 10
    assert store.find("TP=2, stock", same_start) is None, "the file's name holds a part of the key"


def test_a_damaged_row_is_none(tmp_path):
    store = Store(tmp_path)
    store.save("a", "key", {"status": "ok"})
    (path,) = (tmp_path / "rows").iterdir()
    path.write_text('{"format": 1, "key": "key", "sta')
    assert store.find("a", "key") is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "before")
    with pytest.raises(TypeError):
        write_whole(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_names():
    assert slug("4096, TP=2 + TP-SP, stock") == "4096-tp-2-tp-sp-stock"
    assert slug("...") == "run"


def test_the_lock_goes_with_its_holder(tmp_path):
    """One command waits for another, and is not kept waiting by one that was killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        told = []

        def waiting(line: str) -> None:
            told.append(line)
            holder.kill()

        with Store(tmp_path).turn(waiting):
            assert len(told) == 1
            assert f"process {holder.pid} on" in told[0]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_stored_row_is_reused_and_a_failed_one_can_be_tried_again(tmp_path):
    store, told = Store(tmp_path / "out"), []
    failing = job(tmp_path, "raise SystemExit('megatron-seqpar: error: not yet')")
    row = run_job(failing, store, "data", {"label": "a"}, told.append, header="[1/1] a")
    assert (row["status"], row["reason"], row["refused"]) == ("error", "not yet", True)
    assert told == ["[1/1] a"]
    again = run_job(failing, store, "data", {"label": "a"}, told.append, header="[1/1] a")
    assert again == row
    assert told[1:] == ["[1/1] a: error, stored before"]

    counted = tmp_path / "count"
    program = REPORT + f"\nopen({str(counted)!r}, 'a').write('x')\n"
    good = job(tmp_path, program)
    for retry in (True, True, False):
        row = run_job(good, store, "data", {"label": "a"}, told.append, again=retry)
        assert row["status"] == "ok"
    assert counted.read_text() == "x", "what is ok is not run again"
    other = run_job(good, store, "other data", {"label": "a"}, told.append)
    assert other["key"] != row["key"]
    assert counted.read_text() == "xx"


def test_the_key_holds_what_decides_the_numbers(tmp_path):
    plain = job(tmp_path, REPORT)
    keys = {
        plain.key("data"),
        plain.key("other data"),
        job(tmp_path, REPORT, limit_bytes=1).key("data"),
        job(tmp_path, REPORT, environment=(("A", "1"),)).key("data"),
    }
    assert len(keys) == 4


def test_editing_code_meanwhile_does_not_tell_rows_apart(tmp_path):
    before = job(tmp_path, REPORT).key("data")
    assert job(tmp_path, REPORT + "# edited\n").key("data") == before
    code = (
        "import pathlib, sys\n"
        "from megatron_seqpar.experiments.job import Job\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "print(Job('x', 1, (), path, 'cpu').key('data'))\n"
    )
    asked = [sys.executable, "-c", code, str(tmp_path / "program.py")]
    one = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    job(tmp_path, REPORT + "# edited again\n")
    other = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert one != other, "the next command sees it"
