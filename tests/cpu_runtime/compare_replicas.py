# SPDX-License-Identifier: Apache-2.0
"""A script for the launcher: trains, then prints how far parameters that TP replicates differ."""

import gc
import runpy
import sys
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.models.gpt import GPTModel
from megatron.training import training

from tests.cpu_runtime.training import SCRIPT

stock_train = training.train


def train_and_compare(*args: Any, **kwargs: Any) -> Any:
    result = stock_train(*args, **kwargs)
    (model,) = (each for each in gc.get_objects() if isinstance(each, GPTModel))
    group = mpu.get_tensor_model_parallel_group()
    compared, largest = 0, 0.0
    for parameter in model.parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            continue
        copies = [torch.empty_like(parameter.data) for _ in range(group.size())]
        torch.distributed.all_gather(copies, parameter.data.contiguous(), group=group)
        compared += 1
        largest = max(largest, *((copy - copies[0]).abs().max().item() for copy in copies))
    if torch.distributed.get_rank() == 0:
        print(f"REPLICAS compared {compared} largest difference {largest}", flush=True)
    return result


training.train = train_and_compare
sys.path.insert(0, str(SCRIPT.parent))
runpy.run_path(str(SCRIPT), run_name="__main__")
