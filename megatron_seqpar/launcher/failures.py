# SPDX-License-Identifier: Apache-2.0
"""Errors that are the user's to mend take a few lines, not a traceback from every rank."""

from __future__ import annotations

import atexit
import contextlib
import linecache
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from types import TracebackType
from typing import NoReturn

from megatron_seqpar.compatibility import nearest
from megatron_seqpar.errors import SeqParError

TRACEBACK_VARIABLE = "SEQPAR_TRACEBACK"
EXIT_GRACE_SECONDS = 15.0
LOST_PEER_SECONDS = 1.0
_HINT = f"\n    ({TRACEBACK_VARIABLE}=1 shows where)"
SAY_SECONDS = 5.0
"""What a process that is being stopped has to finish saying what went wrong."""
reported = threading.Event()
"""Set once this process begins to say what went wrong."""
said = threading.Event()
"""Set once it has."""
_LOST_PEER = re.compile(
    r"connection closed by peer|connection reset|connection refused|broken pipe|"
    r"application timeout|timed out waiting|socket timeout|store.*(closed|timeout)",
    re.IGNORECASE,
)


def rank_prefix() -> str:
    """'[rank 1/4]': this process and the number of processes."""
    return f"[rank {os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}]"


def say(text: str) -> None:
    """Write `text` to stderr in one piece, so that ranks do not mix their lines."""
    sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, (text + "\n").encode())


def explain(error: BaseException) -> str | None:
    """One or two lines for an error that the user can mend; None where a traceback is needed."""
    text = " ".join(str(error).split())
    if isinstance(error, SeqParError):
        return text
    if lost_peer(error):
        return f"lost the connection to another rank, which has probably failed ({text[:200]})"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no such file: {error.filename}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("megatron."):
        return _missing_part(str(error.name))
    place = _raised_in_megatron(error)
    if place is not None:
        return f"{text or type(error).__name__} (Megatron, {place})"
    return None


def _missing_part(name: str) -> str:
    """For a part of Megatron that the installed package does not hold: where it is to be had."""
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return f"there is no {name}, and megatron-core is not installed"
    tag = nearest(version).tag
    return (
        f"megatron-core {version} holds no {name}; run the script in a Megatron-LM checkout "
        f"({tag}), or put the checkout on PYTHONPATH"
    )


def lost_peer(error: BaseException) -> bool:
    """Whether `error` only says that another rank went away."""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def _raised_in_megatron(error: BaseException) -> str | None:
    """Where Megatron's own check failed ('arguments.py:812'); None for any other error."""
    kinds = (AssertionError, ValueError, RuntimeError, NotImplementedError, KeyError)
    if not isinstance(error, kinds) or error.__traceback__ is None:
        return None
    last: TracebackType = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    file = last.tb_frame.f_code.co_filename
    if "/megatron/" not in file.replace(os.sep, "/"):
        return None
    line = linecache.getline(file, last.tb_lineno).strip()
    if not isinstance(error, AssertionError) and not line.startswith("raise"):
        return None
    return f"{os.path.basename(file)}:{last.tb_lineno}"


def _script_traceback(error: BaseException) -> str:
    """The traceback without the frames of this launcher and of runpy that ran the script."""
    frames = error.__traceback__
    while frames is not None and _is_launching(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    shown = error.with_traceback(frames or error.__traceback__)
    return "".join(traceback.format_exception(shown)).rstrip()


def _is_launching(file: str) -> bool:
    return file == "<frozen runpy>" or os.path.dirname(file) == os.path.dirname(__file__)


def report(error: BaseException) -> None:
    """Print this rank's block for `error` to stderr."""
    short = explain(error)
    if short is None or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        say(f"{rank_prefix()} error:\n{_script_traceback(error)}")
        return
    own = isinstance(error, SeqParError) or lost_peer(error)
    say(f"{rank_prefix()} error: {short}{'' if own else _HINT}")


def leave(code: int) -> NoReturn:
    """End the process with `code`: exit handlers run, but nothing is torn down after them.

    Other ranks may hang in a collective with this one; closing its process groups could wait for
    them, and torch's threads abort an interpreter that shuts down under them.
    """
    timer = threading.Timer(EXIT_GRACE_SECONDS, os._exit, args=(code,))
    timer.daemon = True
    timer.start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def reporting_failures() -> Iterator[None]:
    """Report an error of the body and end the process with status 1, or the one it asks for."""
    try:
        yield
    except SystemExit as leaving:
        if not leaving.code:
            raise
        reported.set()
        if isinstance(leaving.code, str):
            say(f"{rank_prefix()} {leaving.code}")
        said.set()
        leave(leaving.code if isinstance(leaving.code, int) else 1)
    except KeyboardInterrupt:
        # torchrun passes Ctrl-C on to who had it already: the second must not interrupt this
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        reported.set()
        say(f"{rank_prefix()} interrupted")
        said.set()
        leave(128 + signal.SIGINT)
    except BaseException as error:
        reported.set()
        report(error)
        said.set()
        if lost_peer(error):
            # let torchrun see the rank that failed first, and name that one
            time.sleep(LOST_PEER_SECONDS)
        leave(1)
