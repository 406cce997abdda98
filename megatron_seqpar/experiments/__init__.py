# SPDX-License-Identifier: Apache-2.0
"""Training runs as experiments: said in a file, run one by one, each leaving a whole row.

    setting.py   what all runs of an experiment share, read from YAML and checked
    layout.py    a parallel layout, what it cannot be, and its flags
    job.py       one run: arguments, key, and how it is started
    execute.py   runs a job to its end: ok, oom or error, and why
    store.py     rows on disk: whole or not there, one writer at a time

`compare` and `sweep` are built on it. Nothing here imports Megatron or the plugin: runs are
processes of the launcher.
"""
