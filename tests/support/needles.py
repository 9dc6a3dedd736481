"""Slow readers of texts with needles: they answer a question by looking for sentences, and know nothing of episodes."""

import re


def solve(text: str) -> str:
    """The answer to the question at the end of a text, as it would continue it."""
    if found := re.search(r"Which (\d+) variables have the value (\d+)\? They are$", text):
        return " " + ", ".join(_variables(text, found[2]))
    if found := re.search(r"The number of the (\w+ \w+) is$", text):
        return " " + _only(re.findall(rf"The number of the {found[1]} is (\d{{5}})\.", text))
    assert text.endswith("The pass key is"), text[-80:]
    return " " + _only(
        re.findall(r"[Tt]he pass key is (\d{5})\.", text) + re.findall(r"(\d{5}) is the pass key\.", text)
    )


def _variables(text: str, number: str) -> list[str]:
    values = dict(re.findall(r"VAR ([A-Z]{3}) = (\w+)\.", text))

    def value(name: str) -> str:
        return name if name.isdecimal() else value(values[name])

    return [name for name in values if value(name) == number]


def _only(answers: list[str]) -> str:
    assert answers and len(set(answers)) == 1, answers
    return answers[0]
