# SPDX-License-Identifier: Apache-2.0
"""Adam with the interface of NVIDIA's fused one, in plain torch."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .registry import unit


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step count is an int of the parameter group and whose state is two tensors.

    State of a parameter: `exp_avg` and `exp_avg_sq`, of its shape and dtype. Decoupled weight decay
    (AdamW) by default, L2 with `adam_w_mode=False`. amsgrad is refused (ValueError).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **kwargs: Any,
    ) -> None:
        if amsgrad:
            raise ValueError("FusedAdam has no amsgrad variant")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        rate, decay = group["lr"], group["weight_decay"]
        correction1 = correction2 = 1.0
        if group["bias_correction"]:
            correction1 = 1 - beta1 ** group["step"]
            correction2 = 1 - beta2 ** group["step"]
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        mean, square, gradient = state["exp_avg"], state["exp_avg_sq"], parameter.grad
        assert gradient is not None
        if self.adam_w_mode:
            parameter.mul_(1 - rate * decay)
        elif decay:
            gradient = gradient.add(parameter, alpha=decay)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = square.sqrt().div_(correction2**0.5).add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-rate / correction1)


@unit
def fused_adam() -> None:
    """Without TE and apex Megatron falls back to torch's AdamW, which its checkpoints do not fit.

    The distributed optimizer cannot load a torch_dist checkpoint into it and shares one `step`
    tensor between all parameters. Only the name `apex.optimizers` is provided: `import apex` goes
    on failing, so that nothing else of apex is expected. A real apex is left alone.

    Serves: core/optimizer/__init__.py and core/optimizer/distrib_optimizer.py (`from
    apex.optimizers import FusedAdam`, `load_state_dict`).
    """
    if importlib.util.find_spec("apex") is not None:
        return
    module = types.ModuleType("apex.optimizers", "FusedAdam in plain torch, for the CPU runtime.")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    module.FusedSGD = torch.optim.SGD  # type: ignore[attr-defined]
    sys.modules["apex.optimizers"] = module
