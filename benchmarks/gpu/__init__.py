# SPDX-License-Identifier: Apache-2.0
"""Checks and measurements on one GPU; `scripts/gpu_check.sh` runs them, each part in its process.

    settings.py     what a part is told, and what it answers
    environment.py  versions, GPU, kernels found, two ceilings        part "environment"
    truth.py        attention by the book, in fp64 and in low precision
    correctness.py  every kernel against the truth                    part "correctness"
    timing.py       how long the device takes
    speed.py        TFLOP/s of every kernel by tile                   part "speed"
    stress.py       a transport that makes races show
    streams.py      eight ranks, each on its streams, on one GPU      part "streams"
    tiles.py        all tiles and merges against one call             part "tiles"
    processes.py    NCCL and gloo between processes that share a GPU  part "processes"
    training.py     Megatron with and without the plugin              part "training"
    suite.py        the tests that need a GPU                         part "tests"
    report.py       table, JSON, pictures

On the CPU all of it runs at tiny sizes, which tries the code out and measures nothing.
"""
