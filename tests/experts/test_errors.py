from __future__ import annotations

import inspect
import pickle

import pytest

from experts import errors
from experts.errors import ExpertError

EXAMPLES = [
    errors.ExpertConfigError("no weights"),
    errors.InvalidRequestError("bad", "messages.0"),
    errors.ContextLengthError("small", 900, 512),
    errors.UnsupportedFeatureError("small", "tools", "tools"),
    errors.ExpertAuthError("remote", "KEY"),
    errors.ExpertUnavailableError("remote", "refused"),
    errors.ExpertTimeoutError("slow", 2.5),
    errors.ExpertOverloadedError("busy", 3.0),
    errors.ExpertFailedError("broken", "out of memory"),
]
RETRYABLE = {
    errors.ExpertUnavailableError,
    errors.ExpertTimeoutError,
    errors.ExpertOverloadedError,
    errors.ExpertFailedError,
}


def test_every_class_has_an_example():
    classes = {
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, ExpertError) and value is not ExpertError
    }
    assert classes == {type(error) for error in EXAMPLES}
    assert {cls.__name__ for cls in classes} | {"ExpertError"} == set(errors.__all__)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickling_keeps_type_message_and_facts(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_retryable_means_another_try_may_help(error):
    assert error.retryable is (type(error) in RETRYABLE)


def test_sentences_name_facts():
    assert str(EXAMPLES[2]).startswith(
        "this request needs at least 900 tokens but expert 'small' has a"
    )
    assert "2.5 s" in str(EXAMPLES[6])
    assert "KEY" in str(EXAMPLES[4])
