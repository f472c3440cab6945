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
        self.looks_ahead = True  # at the end of step(); else whoever calls it does that
        for group in self.param_groups:
            group.setdefault("alpha", alpha)
            group.setdefault("k", k)

    @torch.no_grad()
    def step(self, closure=None):
        """One RAdam step, then the lookahead. closure: ignored but for its value, as in the original."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and "slow_buffer" not in self.state[p]:
                    self._initialise(p, group["capturable"])
        loss = super().step(closure)
        if self.looks_ahead:
            self.look_ahead(lambda p: int(self.state[p]["step"]))
        return loss

    @torch.no_grad()
    def look_ahead(self, steps_of):
        """The step back of every k-th step. steps_of: parameter -> steps done, a host's number."""
        for group in self.param_groups:
            for p in group["params"]:
                if "slow_buffer" in self.state[p] and steps_of(p) % group["k"] == 0:
                    self.state[p]["slow_buffer"].lerp_(p, group["alpha"])
                    p.copy_(self.state[p]["slow_buffer"])

    def _initialise(self, p, capturable):
        # All of the state: RAdam fills it only where there is none.
        self.state[p] = {
            "step": torch.zeros((), device=p.device if capturable else None),
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


def make_capturable(optimizer, device) -> bool:
    """Prepare an optimizer for steps recorded as a CUDA graph; False if it cannot be.

    Adam and its kin then count their steps on the device. Ranger's every sixth step is not like the others: that part
    of it is left to `after_replay`.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return True
    if "capturable" not in optimizer.defaults:
        return False
    for group in optimizer.param_groups:
        group["capturable"] = torch.device(device).type == "cuda"  # a CPU has no graphs, and refuses
    if isinstance(optimizer, Ranger):
        optimizer.looks_ahead = False
        optimizer.steps_before = None
    return True


def load_state(optimizer, state: dict):
    """optimizer.load_state_dict, but for where steps are counted: that is this run's choice, not that of the file.

    Raises what load_state_dict raises for a state of another optimizer.
    """
    wanted = [group.get("capturable") for group in optimizer.param_groups]
    groups = state["param_groups"]
    if len(groups) == len(wanted):  # else load_state_dict says what is wrong
        groups = [group if choice is None else {**group, "capturable": choice}
                  for group, choice in zip(groups, wanted, strict=True)]  # fmt: skip
    optimizer.load_state_dict({**state, "param_groups": groups})
    for state_of in optimizer.state.values():
        step = state_of.get("step")
        if isinstance(step, torch.Tensor) and not any(wanted):
            state_of["step"] = step.cpu()  # reading it from the device at every step would wait for it


def after_replay(optimizer):
    """What a step leaves to the host when it is replayed: Ranger's look ahead."""
    if not isinstance(optimizer, Ranger):
        return
    if optimizer.steps_before is None:  # read once, counted here from then on
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p in optimizer.state]
        optimizer.steps_before = {p: int(optimizer.state[p]["step"]) - 1 for p in parameters}
    for p in optimizer.steps_before:
        optimizer.steps_before[p] += 1
    optimizer.look_ahead(optimizer.steps_before.get)


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
