"""Which frames of a video are looked at."""

import math

from mmfast.data.images import frame_indices


def test_frames_of_llava_hound():
    assert frame_indices(20, 8) == [0, 2, 5, 8, 10, 13, 16, 19]
    assert frame_indices(3, 8) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert frame_indices(5, 1) == [0]
    assert frame_indices(1, 4) == [0, 0, 0, 0]
    for frames in range(1, 60):
        for count in range(2, 12):
            assert frame_indices(frames, count) == [math.floor((frames - 1) * i / (count - 1)) for i in range(count)]
