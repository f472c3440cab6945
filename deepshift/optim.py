"""Optimizers by the original's names, the parameter groups of its CIFAR-10 and ImageNet scripts, and Ranger."""

import torch
from torch import nn

OPTIMIZERS = ("sgd", "adadelta", "adagrad", "adam", "rmsprop", "radam", "ranger")


class Ranger(torch.optim.RAdam):
    """RAdam with decoupled weight decay, and every k steps a step back towards slowly moving weights.

    lr > 0 (a group may have 0 later), 0 < alpha <= 1, k >= 1; other arguments as torch.optim.RAdam.
    Source: the original's optim/ranger (Zhang et al. 2019, Liu et al. 2019). Raises ValueError for others.
    """

    def __init__(self, params, lr=1e-3, alpha=0.5, k=6, betas=(0.95, 0.999), eps=1e-5, weight_decay=0.0):
        if not lr > 0 or not 0 < alpha <= 1 or k < 1:
            raise ValueError(f"Ranger needs lr > 0, 0 < alpha <= 1 and k >= 1, not {lr:g}, {alpha:g} and {k}")
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=True)
        for group in self.param_groups:
            group.setdefault("alpha", alpha)
            group.setdefault("k", k)

    @torch.no_grad()
    def step(self, closure=None):
        """One RAdam step, then the lookahead. closure: ignored but for its value, as in the original."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and "slow_buffer" not in self.state[p]:
                    self._initialise(p)
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if p.grad is not None and int(state["step"]) % group["k"] == 0:
                    state["slow_buffer"].lerp_(p, group["alpha"])
                    p.copy_(state["slow_buffer"])
        return loss

    def _initialise(self, p):
        # All of the state: RAdam fills it only where there is none.
        self.state[p] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
            "slow_buffer": p.detach().clone(),
        }


def build_optimizer(name: str, groups: list, lr: float, momentum: float = 0.0) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names, in any case; momentum is for SGD only. Raises ValueError for others."""
    kind = name.lower()
    if kind not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose from {', '.join(OPTIMIZERS)}")
    if kind == "sgd":
        return torch.optim.SGD(groups, lr, momentum)
    if kind == "radam":  # decoupled: the default decay of torch is another one than the original's
        return torch.optim.RAdam(groups, lr, decoupled_weight_decay=True)
    classes = {"adadelta": "Adadelta", "adagrad": "Adagrad", "adam": "Adam", "rmsprop": "RMSprop"}
    return Ranger(groups, lr) if kind == "ranger" else getattr(torch.optim, classes[kind])(groups, lr)


def parameter_groups(model: nn.Module, lr: float, lr_sign: float | None, weight_decay: float) -> list[dict]:
    """Three groups, always in this order and possibly empty: all others (with weight decay), signs, shifts."""
    others, signs, shifts = [], [], []
    for name, parameter in model.named_parameters():
        group = signs if name.endswith(".sign") else shifts if name.endswith(".shift") else others
        group.append(parameter)
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": signs, "lr": lr if lr_sign is None else lr_sign, "weight_decay": 0.0},
        {"params": shifts, "lr": lr, "weight_decay": 0.0},
    ]
