"""Which frames of a video are looked at."""


def frame_indices(frames: int, count: int = 8) -> list[int]:
    """``count`` places from the first to the last of ``frames``, evenly spaced and rounded down: LLaVA-Hound (arXiv:2404.01258), Video-LLaVA.

    Their ``linspace`` in whole numbers, so that no rounding of a quotient moves a frame. A video with fewer frames repeats some.

    Raises:
        ValueError: a video without frames, or none asked for.
    """
    if frames < 1 or count < 1:
        raise ValueError(f"frame_indices: expected at least one frame, got {count} of {frames}")
    return [i * (frames - 1) // max(count - 1, 1) for i in range(count)]
