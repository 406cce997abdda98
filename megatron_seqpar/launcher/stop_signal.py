# SPDX-License-Identifier: Apache-2.0
"""When torchrun stops this process because another failed: say so and leave at once.

A process that waits in a collective runs no Python signal handler until the collective returns,
and torchrun would kill it after half a minute. Python's C-level handler writes the signal's number
to a pipe at once; a thread reads it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from .failures import SAY_SECONDS, rank_prefix, reported, said, say

INTERRUPT_SECONDS = 5.0
"""What a script has to clean up in after Ctrl-C."""


def _handler(number: int, frame: FrameType | None) -> None:
    """Marks the signal as ours; the thread does the work."""


def explain_stop() -> None:
    """Watch for SIGTERM in this process (main thread only; elsewhere nothing is changed)."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, _handler)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # a forked worker has no watching thread: SIGTERM must end it as usual
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def _forget() -> None:
    if signal.getsignal(signal.SIGTERM) is _handler:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(reader: int) -> None:
    while data := os.read(reader, 64):
        # a script that handles SIGTERM itself (Megatron's --exit-signal-handler) is left to do so
        if signal.SIGTERM in data and signal.getsignal(signal.SIGTERM) is _handler:
            if reported.is_set():
                said.wait(SAY_SECONDS)
            else:
                say(f"{rank_prefix()} stopped: another rank failed, or the run was cancelled")
            os._exit(128 + signal.SIGTERM)
        if signal.SIGINT in data and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # the main thread raises KeyboardInterrupt, unless it waits in a collective
            time.sleep(INTERRUPT_SECONDS)
            say(f"{rank_prefix()} interrupted")
            os._exit(128 + signal.SIGINT)
