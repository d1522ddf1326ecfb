"""Tasks generate the examples that their papers describe."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from evals.training.tasks import corpus
from evals.training.tasks.base import IGNORED, Task, generator
from evals.training.tasks.copying import Copy, SelectiveCopy
from evals.training.tasks.induction import Induction
from evals.training.tasks.language_modeling import LanguageModeling
from evals.training.tasks.mqar import MQAR
from evals.training.tasks.needle import Needle

TEXT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "bytes.txt"
    path.write_bytes(TEXT)
    return str(path)


TASKS: dict[str, Task] = {
    "mqar": MQAR(24, num_pairs=6, vocabulary=32),
    "mqar, full": MQAR(16, num_pairs=4, vocabulary=11),
    "copy": Copy(10, symbols=3),
    "selective_copy": SelectiveCopy(11, items=4, symbols=5),
    "induction": Induction(3, symbols=2),
    "needle": Needle(9, num_pairs=4, symbols=4, depths=3),
    "needle, one pair": Needle(50, num_pairs=1, symbols=2),
}


@pytest.fixture(params=[*TASKS, "language_modeling"])
def task(request: pytest.FixtureRequest, text: str) -> Task:
    return TASKS[request.param] if request.param in TASKS else LanguageModeling(33, path=text)


def test_examples_depend_on_options_and_the_generator_only(task: Task) -> None:
    first, again, other = (task.batch(50, generator("train", seed, 7)) for seed in (3, 3, 4))
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one, same)
    assert not torch.equal(first.inputs, other.inputs)


def test_batches_have_the_shapes_and_token_ranges_of_the_contract(task: Task) -> None:
    for longer in (task, replace(task, seq_len=4 * task.seq_len)):
        batch = longer.batch(50, generator("form"))
        assert {tuple(tensor.shape) for tensor in batch} == {(50, longer.seq_len)}
        assert batch.inputs.min() >= 0
        assert batch.inputs.max() < longer.vocab_size == task.vocab_size
        expected = batch.targets[batch.targets != IGNORED]
        assert expected.min() >= 0
        assert expected.max() < longer.vocab_size
        assert batch.groups.min() >= 0
        assert batch.groups.max() < len(longer.groups)
        assert (batch.targets != IGNORED).any(dim=1).all()
        assert 0 < longer.chance <= 1


# --- mqar ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_filler", [True, False])
@pytest.mark.parametrize(("n", "pairs", "vocabulary"), [(64, 4, 8192), (64, 16, 100), (8, 1, 6), (512, 64, 1000)])
def test_mqar_has_the_form_of_zoology(n: int, pairs: int, vocabulary: int, random_filler: bool) -> None:
    inputs, targets, _ = MQAR(n, pairs, vocabulary, random_filler=random_filler).batch(100, generator("mqar"))
    for tokens, expected in zip(inputs.tolist(), targets.tolist(), strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocabulary // 2 for key in keys)
        assert all(vocabulary // 2 <= value < vocabulary for value in values)
        positions = [position for position, target in enumerate(expected) if target != IGNORED]
        # Each key once after the pairs, where a pair could begin; the target is its value.
        assert sorted(tokens[position] for position in positions) == sorted(keys)
        assert all(position >= 2 * pairs and position % 2 == 0 for position in positions)
        value_of = dict(zip(keys, values, strict=True))
        assert [expected[position] for position in positions] == [value_of[tokens[position]] for position in positions]
        if not random_filler:
            others = set(range(2 * pairs, n)) - {*positions}
            assert {tokens[position] for position in others} <= {0}


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_mqar_gaps_follow_the_power_law(power: float) -> None:
    _, targets, _ = MQAR(42, 1, 64, power).batch(20_000, generator("gaps", power))
    gaps = ((targets != IGNORED).int().argmax(dim=1) - 2) // 2
    wanted = torch.arange(1, 21).double() ** (power - 1)
    counts = gaps.bincount(minlength=20).double()
    assert chisquare(counts.numpy(), (20_000 * wanted / wanted.sum()).numpy()).pvalue > 1e-3


def test_mqar_gaps_are_drawn_without_replacement() -> None:
    # Two of three positions with weights 1, 1/2, 1/3: the second draw is among what the first left.
    _, targets, _ = MQAR(10, 2, 64, 1e-9).batch(30_000, generator("two"))
    pairs = (targets != IGNORED)[:, 4::2][:, :3]
    missing = pairs.logical_not().int().argmax(dim=1).bincount(minlength=3).double() / 30_000
    p = [6 / 11, 3 / 11, 2 / 11]
    left = [sum(p[a] * p[b] / (1 - p[a]) for a in range(3) for b in range(3) if len({a, b, out}) == 3) for out in range(3)]
    assert missing.tolist() == pytest.approx(left, abs=0.01)


# --- the others ---------------------------------------------------------------------------------


def test_copy_repeats_all_tokens() -> None:
    inputs, targets, _ = Copy(12, symbols=7).batch(50, generator("copy"))
    assert torch.equal(targets[:, 6:], inputs[:, :6])
    assert (targets[:, :6] == IGNORED).all()
    assert (inputs[:, 6] == 7).all()
    assert torch.equal(inputs[:, 7:], inputs[:, :5])


def test_selective_copy_repeats_the_items_in_order() -> None:
    task = SelectiveCopy(40, items=5, symbols=9)
    inputs, targets, _ = task.batch(2000, generator("selective"))
    body = inputs[:, :35]
    items = body[body < 9].view(-1, 5)
    assert torch.equal(targets[:, 35:], items)
    assert (targets[:, :35] == IGNORED).all()
    assert (body[body >= 9] == 9).all()
    assert (inputs[:, 35] == 10).all()
    assert torch.equal(inputs[:, 36:], items[:, :-1])
    # Items stand at all positions.
    assert (body < 9).sum(dim=0).min() > 0


def test_induction_s_target_followed_the_special_token() -> None:
    inputs, targets, _ = Induction(20, symbols=6).batch(2000, generator("induction"))
    assert ((inputs == 6).sum(dim=1) == 2).all()
    assert (inputs[:, -1] == 6).all()
    position = (inputs == 6).int().argmax(dim=1, keepdim=True)
    assert torch.equal(targets[:, -1:], inputs.gather(1, position + 1))
    assert (targets[:, :-1] == IGNORED).all()
    assert set(position.flatten().tolist()) == set(range(18))


@pytest.mark.parametrize("n", [9, 10, 64, 1001])
def test_the_needle_is_at_its_depth(n: int) -> None:
    task = Needle(n, num_pairs=4, symbols=16, depths=5)
    inputs, targets, groups = task.batch(500, generator("needle", n))
    for tokens, expected, depths in zip(inputs.tolist(), targets.tolist(), groups.tolist(), strict=True):
        body, question = tokens[:-1], tokens[-1]
        positions = [position for position, token in enumerate(body) if token < 16]
        assert len(positions) == len({body[position] for position in positions}) == 4
        assert all(16 <= body[position + 1] < 32 for position in positions)
        (position,) = [position for position in positions if body[position] == question]
        assert expected == [IGNORED] * (n - 1) + [body[position + 1]]
        assert abs(position - task.groups[depths[-1]] * (n - 3)) <= 2
        assert all(token >= 32 for at, token in enumerate(body) if at not in positions and at - 1 not in positions)
    assert set(groups.flatten().tolist()) == set(range(5))
    assert task.groups == (0, 0.25, 0.5, 0.75, 1)


# --- text ---------------------------------------------------------------------------------------


def test_windows_are_pieces_of_the_text_and_every_next_byte_is_a_target(text: str) -> None:
    task = LanguageModeling(9, path=text)
    for split in ("train", "validation", "test"):
        inputs, targets, groups = task.batch(50, generator("text"), split)
        assert torch.equal(targets[:, :-1], inputs[:, 1:])
        assert ((targets - inputs) % 256 == 1).all()  # as in TEXT
        assert [task.groups[group] for group in groups[0].tolist()] == [2 ** math.floor(math.log2(t)) for t in range(1, 10)]


def test_a_file_is_split_in_order(text: str) -> None:
    splits = corpus.load_corpus(text).splits
    assert b"".join(splits[name].tobytes() for name in ("train", "validation", "test")) == TEXT
    assert [round(len(splits[name]) / len(TEXT), 2) for name in ("train", "validation", "test")] == [0.9, 0.05, 0.05]


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.txt").write_bytes(b"%03d" % number)
    found = {split: bytes(part).split(b"\n") for split, part in corpus.load_corpus(str(tmp_path)).splits.items()}
    assert sorted(name for part in found.values() for name in part) == [b"%03d" % number for number in range(300)]
    assert 240 < len(found["train"]) < 295
    # A new file does not move another.
    (tmp_path / "new.txt").write_bytes(b"new")
    corpus.load_corpus.cache_clear()
    after = corpus.load_corpus(str(tmp_path))
    for split, part in found.items():
        assert set(bytes(after.splits[split]).split(b"\n")) - {b"new"} == set(part)


def test_the_default_text_is_the_standard_library(text: str) -> None:
    task = LanguageModeling(64)
    library = corpus.load_corpus()
    assert min(map(len, library.splits.values())) > 100_000
    assert b"def main(" in library.splits["train"].tobytes()
    assert task.extra_settings() == {"text_sha256": library.sha256}
    assert len(library.sha256) == 64
    assert library.sha256 != corpus.load_corpus(text).sha256


# --- bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MQAR(64, num_pairs=17), "num_pairs must be at most seq_len / 4 = 16, so that each key can be queried, got 17"),
        (lambda: MQAR(63), "mqar needs an even seq_len, got 63"),
        (lambda: MQAR(64, num_pairs=8, vocabulary=16), "vocabulary must be above 2·num_pairs"),
        (lambda: MQAR(64, power=0), "power must be above 0, got 0"),
        (lambda: MQAR(64, num_pairs=0), "num_pairs must be at least 1, got 0"),
        (lambda: Copy(7), "copy needs an even seq_len"),
        (lambda: Copy(8, symbols=1), "symbols must be at least 2, got 1"),
        (lambda: SelectiveCopy(40, items=9, symbols=8), "items must be from 1 to symbols = 8, got 9"),
        (lambda: SelectiveCopy(9, items=5), "items must be at most seq_len / 2 = 4, got 5"),
        (lambda: Induction(2), "induction needs a seq_len of at least 3, got 2"),
        (lambda: Needle(8), "needle needs a seq_len of at least 9 for 4 pairs and the question, got 8"),
        (lambda: Needle(64, num_pairs=65), "num_pairs must be from 1 to symbols = 64, got 65"),
        (lambda: Needle(64, depths=1), "depths must be at least 2"),
        (lambda: LanguageModeling(64, path="/nowhere"), "there is none at '/nowhere'"),
        (lambda: LanguageModeling(64, path="a", dataset="b"), "a text is of task.path or of task.dataset, not of both"),
        (lambda: LanguageModeling(10**9), "too few for windows of seq_len=1000000000"),
    ],
)
def test_bad_options_are_one_sentence(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value)


def test_a_hugging_face_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(dict):  # type: ignore[type-arg]
        column_names = ("text",)

    def load_dataset(name: str, subset: str | None) -> dict[str, Rows]:
        splits = ("train", "validation", "test") if subset else ("train",)
        return {split: Rows(text=[f"{name} {split}"] * 50) for split in splits}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus.load_corpus.cache_clear()
    own = corpus.load_corpus(dataset="some", subset="part").splits
    assert {bytes(text).split(b"\n")[7] for text in own.values()} == {b"some train", b"some validation", b"some test"}
    cut = corpus.load_corpus(dataset="some").splits
    assert b"".join(cut[split].tobytes() for split in ("train", "validation", "test")) == b"\n".join([b"some train"] * 50)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"task.dataset needs Hugging Face datasets: pip install .*\[datasets\]"):
        corpus.load_corpus(dataset="other")
