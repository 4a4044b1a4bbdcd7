from __future__ import annotations

import pytest

from routers.encoders.surface import SURFACE_FEATURES, surface_features

TEXTS = [
    "",
    " \n\t",
    "\ud800",
    "What is 17 + 25?",
    "x" * 100_000,
    "?" * 5000,
    "A. B. C. D. " * 500,
    "\N{SNOWMAN}" * 50,
    "0" * 3000,
    "${" * 3000,
]


def features(text):
    return dict(zip(SURFACE_FEATURES, surface_features(text), strict=True))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_features_are_shares(text):
    values = surface_features(text)
    assert len(values) == len(SURFACE_FEATURES) == len(set(SURFACE_FEATURES))
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France and which river is there?", "en"),
        ("Was ist die Hauptstadt von Frankreich und welche nicht?", "de"),
        ("Quel est le nom des rivières dans une ville?", "fr"),
        ("¿Qué es una ciudad y por qué los ríos del norte?", "es"),
    ],
)
def test_languages_are_told_apart(text, language):
    found = {name: value for name, value in features(text).items() if name.startswith("language_")}
    assert max(found, key=lambda name: found[name]) == f"language_{language}"


@pytest.mark.parametrize(
    ("text", "script"),
    [("Столица Франции", "cyrillic"), ("法国的首都是哪里", "cjk"), ("ما هي العاصمة", "arabic")],
)
def test_scripts_are_told_apart(text, script):
    assert features(text)[f"script_{script}"] > 0.9
    assert features("plain English")[f"script_{script}"] == 0


def test_options_count_only_if_lettered_without_a_gap():
    question = "Which?\nA) one\nB) two\nC) three\nD) four"
    assert features(question)["options"] == 0.4
    assert features("Which? (A) one (B) two")["options"] == 0.2
    assert features("Plan A. It failed.")["options"] == 0
    assert features("B) two C) three")["options"] == 0


def test_code_and_maths_are_marked():
    code = "def add(a, b):\n    return a + b\n"
    assert features(code)["code"] > features("define a function")["code"] == 0
    assert features(r"Solve $x^2 = 4$ and \\frac{1}{2}")["maths"] > features("solve it")["maths"]


def test_questions_and_requests_are_told_apart():
    asked = features("How many? And why?")
    assert (asked["asks_how"], asked["asks_why"], asked["ends_with_question"]) == (1, 1, 1)
    told = features("Write a poem.")
    assert (told["asks_to_write"], told["ends_with_question"]) == (1, 0)
