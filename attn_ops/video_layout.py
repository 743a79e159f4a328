"""VideoLayout: where the tokens of a video lie in a sequence. Methods that cut space and time into tiles need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .errors import PolicyError, nearest


@dataclass(frozen=True)
class VideoLayout:
    """A grid of video tokens in raster order (time slowest, width fastest), and text tokens after or before it.

    Args:
        grid: (T, H, W), in tokens, that is, latent size / patch size.
        text_tokens: tokens of text in the same sequence.
        text_first: the text comes before the video.

    Raises:
        PolicyError: on a wrong type or size.
    """

    grid: tuple[int, int, int]
    text_tokens: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        grid: object = self.grid
        if not isinstance(grid, list | tuple) or len(grid) != 3 or not all(type(n) is int and n > 0 for n in grid):
            raise PolicyError(f"layout: grid must be three positive ints (T, H, W), got {grid!r}.")
        object.__setattr__(self, "grid", tuple(grid))
        if type(self.text_tokens) is not int or self.text_tokens < 0:
            raise PolicyError(f"layout: text_tokens must be an int of at least 0, got {self.text_tokens!r}.")
        if not isinstance(self.text_first, bool):
            raise PolicyError(f"layout: text_first must be true or false, got {self.text_first!r}.")

    @classmethod
    def parse(cls, value: object) -> VideoLayout:
        """A layout from one, from a table of its fields, or from a grid alone.

        Raises:
            PolicyError: on anything else.
        """
        if isinstance(value, VideoLayout):
            return value
        if isinstance(value, list | tuple):
            return cls(value)  # type: ignore[arg-type]  # checked by the constructor
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or "grid" not in value:
            raise PolicyError(
                f"layout must be a table with grid, got {value!r}. Write layout = {{ grid = [T, H, W] }}."
            )
        for key in value:
            if key not in known:
                raise PolicyError(f"layout: unknown key {key!r}. {nearest(str(key), known)}")
        return cls(**value)

    def to_dict(self) -> dict[str, object]:
        """The table that `parse` reads."""
        table: dict[str, object] = {"grid": list(self.grid)}
        if self.text_tokens:
            table |= {"text_tokens": self.text_tokens, "text_first": self.text_first}
        return table

    @property
    def video_tokens(self) -> int:
        """T * H * W."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """All tokens of the sequence."""
        return self.video_tokens + self.text_tokens

    def mismatch(self, seq: int) -> str | None:
        """Why a sequence of `seq` tokens is not of this layout, with the arithmetic; None if it is."""
        if seq == self.tokens:
            return None
        return f"layout {self} makes {self.tokens} tokens, the sequence has {seq}"

    def __str__(self) -> str:
        video = "x".join(map(str, self.grid))
        if not self.text_tokens:
            return video
        text = f"{self.text_tokens} text"
        return f"{text}+{video}" if self.text_first else f"{video}+{text}"
