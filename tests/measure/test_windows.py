from hypothesis import given
from hypothesis import strategies as st

from longreach.measure.windows import Window, windows


def as_tuples(num_targets, valid_length, stride):
    return [(w.start, w.stop, w.scored) for w in windows(num_targets, valid_length, stride)]


def test_nonoverlapping_golden():
    assert as_tuples(10, 4, 4) == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert as_tuples(8, 4, 4) == [(0, 4, 4), (4, 8, 4)]


def test_sliding_golden():
    # The first window scores all it has; each later one only its last two.
    assert as_tuples(9, 4, 2) == [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 9, 1)]
    assert as_tuples(6, 4, 1) == [(0, 4, 4), (1, 5, 1), (2, 6, 1)]


def test_short_text_is_one_window():
    assert as_tuples(3, 100, 7) == [(0, 3, 3)]


@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_every_target_is_scored_once_and_in_order(num_targets, valid_length, data):
    stride = data.draw(st.integers(1, valid_length))
    scored = []
    for window in windows(num_targets, valid_length, stride):
        assert 0 <= window.start < window.stop <= num_targets
        assert window.stop - window.start <= valid_length
        assert 1 <= window.scored <= window.stop - window.start
        scored += range(window.stop - window.scored, window.stop)
    assert scored == list(range(num_targets))


@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_context_after_the_first_window_is_at_least_what_the_stride_leaves(num_targets, valid_length, data):
    stride = data.draw(st.integers(1, valid_length))
    for window in list(windows(num_targets, valid_length, stride))[1:]:
        first_context = window.stop - window.scored - window.start + 1
        assert first_context == valid_length - stride + 1


def test_windows_are_values():
    assert Window(0, 4, 4) == Window(0, 4, 4)
