"""Colours for numbers, the same in the terminal, in pages and in PNGs; readable with colour blindness and in print.

One scale goes from dark blue over green to yellow (matplotlib's viridis, CC0), the other from blue over white to
orange.
"""

from __future__ import annotations

import numpy as np

SEQUENTIAL = "440154 482878 3e4a89 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
DIVERGING = "053061 2166ac 5a9bcb a5cbe3 f7f7f7 fbc48a ee8e3c bf5b10 7f3b08"


def stops(diverging: bool) -> np.ndarray:
    """The colours at equal steps from the lowest number to the highest: uint8 [n, 3]."""
    return np.array([list(bytes.fromhex(c)) for c in (DIVERGING if diverging else SEQUENTIAL).split()], np.uint8)


def rgb(values: np.ndarray, low: float, high: float, diverging: bool) -> np.ndarray:
    """Colours of numbers, float [...] -> uint8 [..., 3]: `low` and below the first one, `high` and above the last.

    NaN gets the first colour; callers draw such cells differently.
    """
    table = stops(diverging).astype(np.float64)
    place = (np.asarray(values, np.float64) - low) / ((high - low) or 1.0)
    place = np.nan_to_num(np.clip(place, 0, 1)) * (len(table) - 1)
    return np.stack([np.interp(place, np.arange(len(table)), c) for c in table.T], axis=-1).round().astype(np.uint8)


def ink(colour: np.ndarray) -> np.ndarray:
    """True where black text is more readable than white on a colour: uint8 [..., 3] -> bool [...].

    By relative luminance L: black's contrast is (L + 0.05) / 0.05, white's 1.05 / (L + 0.05). Source: WCAG 2.2.
    """
    share = colour / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return (luminance + 0.05) ** 2 > 0.05 * 1.05
