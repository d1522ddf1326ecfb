"""Check of streaming: `extend` over any split of a sequence equals `forward`, and a state is a value."""

from collections.abc import Iterator
from itertools import pairwise

import safetensors.torch
import torch

from bsbr.interface import State
from evals.certification.subject import Subject, first_difference
from evals.errors import one_sentence


def streaming(subject: Subject) -> str | None:
    """`extend` over any split of a sequence gives what `forward` gives, and does not change the state it is given."""
    generator = torch.Generator().manual_seed(4)
    for time in subject.lengths:
        x = subject.inputs(time, batch=2)
        whole = subject.attention(x)
        for split in _splits(time, subject.block, generator):
            outputs, state, position = [], None, 0
            for piece in x.split(split, dim=1):
                before = _copy(state)
                output, new_state = subject.attention.extend(piece, state)
                if changed := [name for name in before if state is not None and not torch.equal(before[name], state[name])]:
                    return f"extend by {piece.shape[1]} tokens after {position} changes the state it is given: {', '.join(changed)}"
                outputs.append(output)
                state, position = new_state, position + piece.shape[1]
            if where := first_difference(torch.cat(outputs, dim=1), whole):
                pieces = str(split) if len(split) <= 6 else f"[{', '.join(map(str, split[:4]))}, … {len(split)} pieces]"
                return f"extend over {pieces} tokens differs from forward in {where} (n={time})"
    return _continuation(subject)


def _continuation(subject: Subject) -> str | None:
    """One state serves several continuations, also after it was saved and loaded."""
    prefix = subject.block + subject.block // 2 + 1
    x, y = subject.inputs(prefix, batch=2), subject.inputs(subject.block, batch=2, seed=5)
    whole = subject.attention(torch.cat([x, y], dim=1))[:, prefix:]
    _, state = subject.attention.extend(x)
    try:
        loaded = safetensors.torch.load(safetensors.torch.save(state))
        loaded = {name: tensor.to(state[name].device) for name, tensor in loaded.items()}
    except (ValueError, RuntimeError) as error:
        return f"safetensors cannot save the state after {prefix} tokens: {one_sentence(error).partition('. ')[0]}"
    for name, given in (("the state", state), ("the state used a second time", state), ("the state saved and loaded", loaded)):
        output, _ = subject.attention.extend(y, given)
        if where := first_difference(output, whole):
            return f"{subject.block} tokens after {name} of {prefix} tokens differ from forward in {where}"
    return None


def _splits(time: int, block: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Lengths of the pieces of a sequence: uncut, token by token, cut at and beside block boundaries, and cut at random."""
    yield [time]
    yield [1] * time
    for step in sorted({max(1, block - 1), block, block + 1}):
        yield [step] * (time // step) + [time % step] * (time % step > 0)
    cuts = {int(cut) for cut in torch.randint(1, max(2, time), (5,), generator=generator)} - {time}
    yield [stop - start for start, stop in pairwise([0, *sorted(cuts), time])]


def _copy(state: State | None) -> State:
    return {} if state is None else {name: tensor.clone() for name, tensor in state.items()}
