"""Dropout bits: known answers of Philox 4x32-10, and Python against C++."""

from __future__ import annotations

import pytest
import torch

from vicinal import _backends, philox

# counter, key, words: the known answers published with the paper (Random123)
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFF_FFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    got = philox.philox(torch.tensor(signed(key)), *[torch.tensor(c) for c in counter])
    assert tuple(int(w) for w in got) == words


@pytest.mark.skipif(_backends._C is None, reason=f"cpu: {_backends.have_cpu('cpu')}")
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_in_cpp(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    assert _backends._C.philox(key, *counter) == words


@pytest.mark.skipif(_backends._C is None, reason=f"cpu: {_backends.have_cpu('cpu')}")
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.25, 0.5, 1 / 3, 0.999999, 1 - 1e-12])
def test_thresholds_of_cpp_are_those_of_python(p: float) -> None:
    assert _backends._C.dropout_threshold(p) == philox.threshold(p)


def test_kept_slots_are_the_words_of_their_group() -> None:
    seed, query, head, slots = 2**62 + 12345, torch.tensor([0, 7, 2**28]), torch.tensor(9), 11
    kept = philox.keep(torch.tensor([seed]), 0.4, query, head, slots)
    for i, token in enumerate(query.tolist()):
        for slot in range(slots):
            counter = [torch.tensor(c) for c in (slot // 4, token, 9, 0)]
            word = int(philox.philox(torch.tensor(seed), *counter)[slot % 4])
            assert bool(kept[i, slot]) == (word >= philox.threshold(0.4))


def test_share_of_kept_slots() -> None:
    for p in (0.1, 0.5, 0.9):
        kept = philox.keep(torch.tensor([3]), p, torch.arange(500)[:, None], torch.arange(8), 50)
        n = kept.numel()
        assert abs(float(kept.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
