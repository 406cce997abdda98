# SPDX-License-Identifier: Apache-2.0
"""Which errors take a line and which a traceback."""

import pytest

from megatron_seqpar.errors import UnsupportedError
from megatron_seqpar.launcher.failures import explain, lost_peer, report


def raised_in(file: str, code: str, monkeypatch: pytest.MonkeyPatch) -> BaseException:
    """The error of `code` as if it stood in `file`."""
    import linecache

    lines = [line + "\n" for line in code.splitlines()]
    monkeypatch.setitem(linecache.cache, file, (len(code), None, lines, file))
    try:
        exec(compile(code, file, "exec"), {})
    except Exception as error:
        return error
    raise AssertionError("the code raised nothing")


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        (
            "/x/megatron/training/arguments.py",
            "assert 0, 'no tp'",
            "no tp (Megatron, arguments.py:1)",
        ),
        (
            "/x/megatron/core/a.py",
            "\nraise ValueError('bad\\n  size')",
            "bad size (Megatron, a.py:2)",
        ),
        ("/x/megatron/core/a.py", "assert 0", "AssertionError (Megatron, a.py:1)"),
        ("/x/megatron/core/a.py", "int('x')", None),
        ("/x/mine/a.py", "assert 0, 'mine'", None),
        ("/x/mine/a.py", "open('/no/such/file')", "no such file: /no/such/file"),
    ],
)
def test_megatrons_own_checks_take_a_line(
    file: str, code: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert explain(raised_in(file, code, monkeypatch)) == expected


def test_errors_of_the_plugin_take_their_text() -> None:
    assert explain(UnsupportedError("--fp8-format needs a GPU")) == "--fp8-format needs a GPU"


def test_a_part_that_the_package_lacks_is_said_to_be_in_a_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The package of megatron-core 0.16 has no `megatron.training`."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.16.1")
    text = str(explain(ModuleNotFoundError("No module", name="megatron.training")))
    assert "megatron-core 0.16.1 holds no megatron.training" in text
    assert "checkout (core_v0.16.1)" in text
    assert explain(ModuleNotFoundError("No module", name="mine")) is None


def test_a_lost_peer_is_recognised() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert lost_peer(gone)
    assert "another rank" in str(explain(gone))
    assert not lost_peer(RuntimeError("shape mismatch"))
    assert not lost_peer(ValueError("connection closed by peer"))


def test_the_traceback_can_be_had(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    error = raised_in("/x/megatron/core/a.py", "assert 0, 'uneven'", monkeypatch)
    report(error)
    assert capfd.readouterr().err == (
        "[rank 1/4] error: uneven (Megatron, a.py:1)\n    (SEQPAR_TRACEBACK=1 shows where)\n"
    )
    monkeypatch.setenv("SEQPAR_TRACEBACK", "1")
    report(error)
    shown = capfd.readouterr().err
    assert shown.startswith("[rank 1/4] error:\nTraceback")
    assert 'File "/x/megatron/core/a.py", line 1' in shown
