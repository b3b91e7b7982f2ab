"""Round numbers down, so that a recipe's values are round, and nearly equal facts give the same recipe."""


def power_of_two(most: float) -> int:
    """Return the largest power of two that is at most ``most``, at least 1."""
    return 1 << max(0, int(most).bit_length() - 1)


def two_digits(number: float) -> int:
    """Round down to two significant digits."""
    whole = int(number)
    unit = 10 ** max(0, len(str(whole)) - 2)
    return whole // unit * unit
