"""Tasks side by side: results in order, no more begun than said, errors in order, nothing left behind."""

import threading
import time

import pytest

from fedgram.flora_na._in_order import InTurn, in_order


def working_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fedgram-portion")]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order_and_no_more_is_begun_than_workers(workers):
    begun, taken, most = [], [], []

    def task(i):
        begun.append(i)
        most.append(len(begun) - len(taken))
        time.sleep(0.02 if i % 2 == 0 else 0)
        return i

    for result in in_order((lambda i=i: task(i) for i in range(9)), workers):
        taken.append(result)
    assert taken == list(range(9))
    assert max(most) <= workers
    assert working_threads() == []


def test_two_are_worked_on_at_a_time():
    both = threading.Barrier(2, timeout=30)
    places = list(in_order([both.wait] * 6, 2))  # each of two waiters has another
    assert [sorted(places[i : i + 2]) for i in (0, 2, 4)] == [[0, 1]] * 3


def test_one_worker_is_the_thread_that_asks():
    asking = threading.get_ident()
    assert list(in_order([threading.get_ident] * 2, 1)) == [asking] * 2


def test_the_first_error_in_order_comes_after_the_results_before_it():
    late = threading.Event()

    def first():
        late.wait(30)
        return "first"

    def second():
        late.set()
        raise ValueError("second")

    results = in_order([first, second, lambda: "third"], 2)
    assert next(results) == "first"
    with pytest.raises(ValueError, match="second"):
        next(results)
    assert working_threads() == []


def test_a_caller_that_goes_waits_for_what_was_begun():
    done = []
    results = in_order([lambda i=i: (time.sleep(0.05), done.append(i)) for i in range(9)], 2)
    next(results)
    results.close()
    assert working_threads() == []
    assert sorted(done) == [0, 1]


def test_values_are_made_in_turn():
    inside, most = [], []

    class Slow(dict):
        def __getitem__(self, key):
            inside.append(key)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(key)
            return super().__getitem__(key)

    values = InTurn(Slow(a=1, b=2))
    assert list(in_order([lambda: values["a"], lambda: values["b"]] * 3, 2)) == [1, 2] * 3
    assert max(most) == 1
    assert (list(values), len(values), "a" in values, "c" in values) == (["a", "b"], 2, True, False)
    with pytest.raises(KeyError):
        values["c"]
