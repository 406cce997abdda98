# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause; the launcher prints them without a traceback."""


class SeqParError(Exception):
    """Base of every error that is the user's to mend; its text says what to change."""


class UnsupportedError(SeqParError, ValueError):
    """A combination that cannot be served: names the flag, its value and what to use instead."""


class ScheduleError(SeqParError, ValueError):
    """A schedule that cannot be built for the asked sizes, or that fails `verify()`."""


class KernelError(SeqParError, RuntimeError):
    """An attention kernel that was asked for by name but cannot serve the call."""


class ClusterError(SeqParError, ValueError):
    """A cluster description that is missing or wrong: names the file, the field and its value."""
