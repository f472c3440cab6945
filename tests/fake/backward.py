"""Backward without PyTorch's engine, which asks the CUDA runtime for streams: the same nodes, in a valid order."""

import contextlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge


def install():
    """Patch torch.autograd.backward, which Tensor.backward calls, and torch.autograd.grad: for fake tensors only."""
    engine_backward, engine_grad = torch.autograd.backward, torch.autograd.grad

    def run_backward(tensors, grad_tensors=None, *args, **options):
        outputs = _as_list(tensors)
        if not any(type(output) is FakeTensor for output in outputs):
            return engine_backward(tensors, grad_tensors, *args, **options)
        for leaf, grad in _leaves_and_gradients(outputs, _as_list(grad_tensors)):
            leaf.grad = grad.detach() if leaf.grad is None else leaf.grad.add_(grad)

    def run_grad(outputs, inputs, grad_outputs=None, *args, **options):
        if not any(type(output) is FakeTensor for output in _as_list(outputs)):
            return engine_grad(outputs, inputs, grad_outputs, *args, **options)
        found = {id(leaf): grad for leaf, grad in _leaves_and_gradients(_as_list(outputs), _as_list(grad_outputs))}
        return tuple(found[id(each)] for each in _as_list(inputs))  # which are leaves

    torch.autograd.backward, torch.autograd.grad = run_backward, run_grad


def _as_list(tensors):
    return [] if tensors is None else [tensors] if isinstance(tensors, Tensor) else list(tensors)


@torch.no_grad()
def _leaves_and_gradients(outputs, grads):
    """Every leaf that the outputs depend on, with its gradient; grads: of the outputs (default: ones)."""
    if not all(output.requires_grad for output in outputs):
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    collected, found = {}, []
    for output, grad in zip(outputs, grads or [None] * len(outputs), strict=True):
        edge = get_gradient_edge(output)
        _collect(collected, edge.node, edge.output_nr, torch.ones_like(output) if grad is None else grad, "the caller")
    for node in _in_order(list(collected)):
        arrived = collected.pop(node, None)
        if arrived is None:  # only undefined gradients came this way
            continue
        if type(node).__name__ == "AccumulateGrad":
            found.append((node.variable, arrived[0]))
            continue
        for (target, place), grad in zip(node.next_functions, _call(node, arrived), strict=True):
            if target is not None and grad is not None:
                _collect(collected, target, place, grad, node.name())
    return found


def _in_order(roots):
    """All nodes below the roots, each after those that lead to it."""
    waiting, stack = dict.fromkeys(roots, 0), list(roots)
    while stack:
        for target, _ in stack.pop().next_functions:
            if target is None:
                continue
            if target not in waiting:
                waiting[target] = 0
                stack.append(target)
            waiting[target] += 1
    ready = [root for root in roots if not waiting[root]]
    while ready:
        node = ready.pop()
        yield node
        for target, _ in node.next_functions:
            if target is not None:
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)


def _call(node, arrived):
    """A node's gradients, one for each of its next_functions."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        given = node(*arrived)
        return given if isinstance(given, tuple) else (given,)
    kinds = node._input_metadata  # a function that asks for None instead of zeros cannot be told from the others
    arrived = [_zeros(kind) if grad is None else grad for grad, kind in zip(arrived, kinds, strict=True)]
    given = node.apply(*arrived)
    given = given if isinstance(given, tuple) else (given,)
    # A function written in Python returns a value for each argument, but only tensors have a place in next_functions.
    wanted = iter([grad for grad, needed in zip(given, node.needs_input_grad, strict=True) if needed])
    return [None if target is None else next(wanted) for target, _ in node.next_functions]


def _zeros(kind):
    return torch.zeros(tuple(kind.shape), dtype=kind.dtype, device=kind.device)


def _collect(collected, target, place, grad, source):
    """Add to what a node is called with; raises RuntimeError for a gradient that the engine would refuse."""
    kinds = target._input_metadata
    kind = kinds[place] if kinds else target.variable
    shape = tuple(kind.shape)
    if tuple(grad.shape) != shape:
        with contextlib.suppress(RuntimeError):
            grad = grad.sum_to_size(shape)  # of what was expanded
    if tuple(grad.shape) != shape or grad.device != kind.device:
        found, expected = ((tuple(each.shape), str(each.device)) for each in (grad, kind))
        raise RuntimeError(f"{source} returned an invalid gradient: {found} for {expected}")
    grads = collected.setdefault(target, [None] * max(1, len(kinds)))
    grad = grad if grad.dtype == kind.dtype else grad.to(kind.dtype)
    grads[place] = grad if grads[place] is None else grads[place] + grad
