"""The words that needle tasks are made of, all of them in this file."""

from __future__ import annotations

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""What a text says where it hides nothing, over and over (Mohtashami and Jaggi, arXiv:2305.16300)."""

ADJECTIVES = (
    *("amber", "brave", "bright", "broken", "calm", "clever", "cold", "crooked", "dark", "distant", "early", "empty"),
    *("faded", "famous", "gentle", "golden", "hidden", "hollow", "honest", "humble", "iron", "large", "late", "little"),
    *("lonely", "narrow", "noisy", "northern", "patient", "purple", "quiet", "rapid", "rusty", "secret", "silver"),
    *("simple", "small", "southern", "steep", "stone", "sudden", "tall", "tired", "warm", "wild", "wooden", "young"),
    "western",
)
"""First words of a thing that has a number."""

NOUNS = (
    *("anchor", "apple", "basket", "bell", "boat", "bottle", "bridge", "candle", "castle", "clock", "cloud", "coat"),
    *("compass", "corner", "curtain", "desk", "door", "engine", "farmer", "feather", "fence", "forest", "garden"),
    *("hammer", "harbour", "island", "kettle", "ladder", "lamp", "letter", "map", "market", "mill", "mirror"),
    *("mountain", "needle", "orchard", "painter", "pocket", "river", "road", "sailor", "shadow", "spoon", "station"),
    *("street", "table", "teacher", "tower", "train", "valley", "wagon", "wall", "wheel", "window"),
)
"""Second words of a thing that has a number."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What names of variables are made of."""
