"""Check of conditions: an output depends on the inputs and the weights, and on nothing else that a call finds."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from bsbr.interface import Attention
from evals.certification.subject import Configuration, Subject, first_difference, no_dropout, threads


def conditions(subject: Subject) -> str | None:
    """The same output with gradients, in training mode without dropout, with two threads, from a copy, with other strides.

    The attention of the subject has been called with many inputs by now, so that one that remembers differs from a new one. An
    output also stays as it is when the attention is called again.
    """
    attention = subject.attention
    for time in (subject.block, subject.lengths[-1]):
        x = subject.inputs(time, batch=2)
        state = _torch_state()
        truth = attention(x).clone()
        if changed := [name for name, value in _torch_state().items() if value != state[name]]:
            return f"a call changes torch's {', '.join(changed)} for the whole process (n={time})"
        for name, call in CONDITIONS.items():
            subject.configurations.add(Configuration(time, 2, x.dtype, name))
            if where := first_difference(call(subject, x).detach(), truth):
                return f"{name} changes {where} (n={time})"
        if failure := _overwritten(attention, x, subject.inputs(time, batch=2, seed=1)):
            return f"{failure} (n={time})"
        if failure := _gradient_in_training(subject, x):
            return f"{failure} (n={time})"
    return None


# --- one function a condition -------------------------------------------------------------------


def _call(attention: Attention, x: Tensor) -> Tensor:
    output: Tensor = attention(x)
    return output


def _with_gradients(subject: Subject, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return _call(subject.attention, x.clone().requires_grad_())


def _in_inference_mode(subject: Subject, x: Tensor) -> Tensor:
    with torch.inference_mode():
        output = _call(subject.attention, x.clone())
    return output.clone()


def _in_training(subject: Subject, x: Tensor) -> Tensor:
    attention = subject.in_dtype(x.dtype).train()
    with no_dropout(attention):
        return _call(attention, x)


def _with_two_threads(subject: Subject, x: Tensor) -> Tensor:
    with threads(2):
        return _call(subject.attention, x)


def _from_a_copy(subject: Subject, x: Tensor) -> Tensor:
    return _call(copy.deepcopy(subject.attention), x)


def _from_a_new_module(subject: Subject, x: Tensor) -> Tensor:
    return _call(subject.in_dtype(x.dtype), x)


def _with_loaded_weights(subject: Subject, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        attention = subject.build().to(x.device, x.dtype).eval()
    attention.load_state_dict(subject.attention.state_dict())
    return _call(attention, x)


def _time_first(subject: Subject, x: Tensor) -> Tensor:
    return _call(subject.attention, x.transpose(0, 1).contiguous().transpose(0, 1))


def _every_second_feature(subject: Subject, x: Tensor) -> Tensor:
    return _call(subject.attention, x.repeat_interleave(2, dim=2)[:, :, ::2])


CONDITIONS: dict[str, Callable[[Subject, Tensor], Tensor]] = {
    "computing gradients": _with_gradients,
    "inference mode": _in_inference_mode,
    "training mode without dropout": _in_training,
    "a second thread": _with_two_threads,
    "a deep copy": _from_a_copy,
    "a module that has seen no other input": _from_a_new_module,
    "a module that has loaded its weights": _with_loaded_weights,
    "an input that lies in memory time first": _time_first,
    "an input of every second element": _every_second_feature,
}


def _torch_state() -> dict[str, object]:
    """What torch's operations depend on beside their arguments."""
    return {
        "number of threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "gradient mode": torch.is_grad_enabled(),
    }


# --- more than an output ------------------------------------------------------------------------


def _overwritten(attention: Attention, x: Tensor, other: Tensor) -> str | None:
    output = attention(x)
    before = output.clone()
    attention(other)
    if where := first_difference(output, before, allowed=0.0):
        return f"a second call overwrites what the first returned: {where}"
    return None


def _gradient_in_training(subject: Subject, x: Tensor) -> str | None:
    """The gradient in training mode is that in eval mode."""
    gradients: list[Tensor] = []
    with torch.enable_grad():
        for training in (False, True):
            leaf = x.clone().requires_grad_()
            attention = subject.in_dtype(x.dtype).train(training)
            with no_dropout(attention):
                output = attention(leaf)
            gradients += torch.autograd.grad(output.square().sum(), leaf)
    where = first_difference(gradients[1], gradients[0])
    return f"training mode without dropout changes the gradient: {where.replace('output', 'input')}" if where else None
