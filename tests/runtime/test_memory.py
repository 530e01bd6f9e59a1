"""Large pages change where memory lies, not what is in it."""

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
from resident import resident_share

from yunque.runtime import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="large pages are used on Linux only")
SIZE = 16 << 20


def huge_kilobytes(address):
    """Of the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(number, 16) for number in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1])
    return 0


def test_memory_of_the_weights_lies_on_large_pages_unchanged():
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8"):
        pytest.skip("large pages are off")
    former = memory.anonymous_ranges()
    block = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_NOHUGEPAGE)  # small ones so far, and a range of its own
    values = np.frombuffer(block, np.uint32)
    values[:] = np.arange(len(values))
    address = values.ctypes.data
    assert huge_kilobytes(address) == 0
    memory.use_large_pages(memory.anonymous_ranges())
    assert huge_kilobytes(address) == 0  # it was there before
    memory.use_large_pages(former)
    assert huge_kilobytes(address) >= SIZE // 2 // 1024
    assert (values == np.arange(len(values))).all()


@pytest.mark.parametrize(("shape", "edge"), [((3, 5), 64), ((8, 3, 1 << 18), 2 << 20)])
def test_zeros_begin_on_a_boundary(shape, edge):
    found = [memory.zeros(shape) for _ in range(5)]
    for number, array in enumerate(found):
        assert array.shape == shape
        assert array.ctypes.data % edge == 0
        assert not array.any()
        array[...] = number
    assert [int(array.max()) for array in found] == [int(array.min()) for array in found] == [0, 1, 2, 3, 4]


def test_rows_that_are_touched_have_their_memory(exported):
    model = exported("t5").runtime
    rows = model.new_rows()
    model.begin(rows, [[5, 6, 7]] * 2, [9] * 2)
    rows.reserve(17, 1 << 15, 1 << 15)  # so large that the C library asks for them anew
    logits = rows.logits[:2].copy()
    large = [array for array in rows.caches if array.nbytes > 32 << 20]
    assert large
    if resident_share(memory.zeros(large[0].shape)) > 0.2:
        pytest.skip("this system gives all memory at once")
    assert max(map(resident_share, large)) < 0.2  # the two rows in use
    rows.touch()
    assert {resident_share(array) for array in large} == {1.0}
    rows.step(np.array([3, 3]))
    assert np.isfinite(rows.logits[:2]).all()
    assert (rows.logits[:2] != logits).any()


def test_rows_have_room_for_as_many_as_are_wanted_from_the_first_on(exported):
    model = exported("t5").runtime
    rows, grown = model.new_rows(), model.new_rows()
    rows.most = 12
    former = []
    for prompts in ([[5, 6, 7]], [[8, 9]] * 6, [[4]] * 5):
        former.append(rows.caches)
        for each in (rows, grown):
            model.begin(each, prompts, [9] * len(prompts))
    assert [array.shape[0] for array in rows.caches] == [12] * len(rows.caches)
    for arrays in former[1:]:
        assert all(now is then for now, then in zip(rows.caches, arrays, strict=True))
    for each in (rows, grown):
        each.step(np.arange(3, 15))
    assert (rows.logits[:12] == grown.logits[:12]).all()
    model.begin(rows, [[6, 7, 8]], [40])  # one more than were wanted, and a wider one
    assert rows.capacity == (13, 80, 16)
    rows.truncate(12)
    for each in (rows, grown):
        each.step(np.arange(4, 16))
    assert (rows.logits[:12] == grown.logits[:12]).all()
