# SPDX-License-Identifier: Apache-2.0
"""Measurements of one rank: bytes it sends, memory it uses. Imports torch only, and lazily.

traffic.py         bytes and calls through torch.distributed, by kind of operation
memory.py          peak memory of this process
nvml.py            memory, power, clock, load and NVLink of one GPU
sampler.py         samples of it in a thread, and what they come to
perfetto.py        trace files: bars on tracks, one process a rank
trace.py           traces of ranks in files, joined on one clock
attention_bars.py  bars from what attention's recorder and watched transport kept
"""
