"""Numbers as a report prints them; what was not measured, or is not finite, is a dash."""

import math

DASH = "–"
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def is_number(value: float | None) -> bool:
    """Whether `value` was measured and is finite."""
    return value is not None and math.isfinite(value)


def exact(value: float | None) -> str:
    """A whole number with separators: 1,309,705,728."""
    return f"{value:,.0f}" if value is not None and is_number(value) else DASH


def short(value: float | None) -> str:
    """Three digits and a letter: 1.31B."""
    if value is None or not is_number(value):
        return DASH
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # The next letter begins where three digits would round up to 1000.
        if abs(value) >= 0.9995 * limit:
            return f"{_three_digits(value / limit)}{letter}"
    return f"{value:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - int(math.log10(max(1.0, abs(value) + 0.0005))))}f}"


def power(value: float | None) -> str:
    """Scientific notation as it is written by hand: 1.23 × 10¹⁴."""
    if value is None or not is_number(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def duration(seconds: float | None) -> str:
    """Wall time with its two largest units: 2 min 03 s."""
    if seconds is None or not is_number(seconds):
        return DASH
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {second:02d} s"
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02d} h" if days else f"{hours} h {minute:02d} min"


def decimal(value: float | None, places: int = 4) -> str:
    """A fixed number of decimals: 1.7123."""
    return f"{value:.{places}f}" if value is not None and is_number(value) else DASH


def signed(value: float | None, places: int = 4) -> str:
    """A difference with its sign: +0.0123."""
    return f"{value:+.{places}f}".replace("-", "−") if value is not None and is_number(value) else DASH


def change(value: float | None) -> str:
    """A tiny difference with its sign: +3.1 × 10⁻⁷."""
    if value is None or not is_number(value):
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:+.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", "−")


def sentence(text: str) -> str:
    """`text` with a capital at its beginning: Macro F1."""
    return text[:1].upper() + text[1:]


def difference(after: float | None, before: float | None) -> float | None:
    """after - before; None where one of them was not measured."""
    return None if after is None or before is None or not math.isfinite(after - before) else after - before
