"""Replacements come and go in any order, and leave no trace."""

from types import ModuleType

import pytest

from prism_kernels.hosts.patching import Counter, Replacement, Shadow, Use


@pytest.fixture
def library():
    module = ModuleType("library")
    module.answer = 0
    return module


def use(owner, name, value):
    return Use([Replacement(owner, name, value)], Counter())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2), (0, 2, 1)])
def test_the_latest_in_force_holds_whatever_the_order_of_undoing(library, order):
    uses = [use(library, "answer", i + 1) for i in range(3)]
    for undone in order:
        uses[undone].undo()
        left = [i + 1 for i in range(3) if uses[i].in_force]
        assert library.answer == (left[-1] if left else 0)


def test_undoing_twice_does_not_undo_another(library):
    first, second = use(library, "answer", 1), use(library, "answer", 2)
    second.undo()
    second.undo()
    assert library.answer == 1 and first.in_force


def test_an_attribute_that_was_not_there_goes_again(library):
    with use(library, "question", 1):
        assert library.question == 1
    assert not hasattr(library, "question")


def test_an_exception_in_the_block_undoes_and_goes_through(library):
    with pytest.raises(KeyError), use(library, "answer", 1):
        raise KeyError
    assert library.answer == 0


def test_a_use_ends_for_good(library):
    ended = use(library, "answer", 1)
    ended.undo()
    with pytest.raises(RuntimeError, match="Make a new one"), ended:
        raise AssertionError("entered")
    assert library.answer == 0


def test_calls_are_those_of_the_time_in_force(library):
    counter = Counter("f", "g")
    counter.add("f")
    outer = Use([], counter)
    counter.add("f")
    with Use([], counter) as inner:
        counter.add("g")
    counter.add("f")
    outer.undo()
    counter.add("f")
    assert outer.calls == {"f": 2, "g": 1}
    assert inner.calls == {"f": 0, "g": 1}


def test_a_shadow_hides_what_instances_hold_and_keeps_what_they_store():
    class Layer:
        def __init__(self, rule):
            self.rule = rule

    before = Layer("theirs")
    with use(Layer, "rule", Shadow("rule", "ours")):
        inside = Layer("theirs too")
        assert before.rule == inside.rule == "ours"
    assert (before.rule, inside.rule) == ("theirs", "theirs too")
    assert "rule" not in vars(Layer)
