"""`shoal.train` is a folder that can be called, and stays itself in what is sent to workers."""

import cloudpickle
import pytest

import shoal
import shoal.serve
import shoal.train


@pytest.mark.parametrize("verb", [shoal.train, shoal.serve], ids=["train", "serve"])
def test_a_function_that_names_a_verb_can_be_sent(verb):
    def calls() -> object:
        return verb

    assert cloudpickle.loads(cloudpickle.dumps(calls))() is verb
