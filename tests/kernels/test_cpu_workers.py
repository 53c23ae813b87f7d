"""Workers: every part runs once, with its share of threads, and errors, nesting and forks are survived."""

import multiprocessing
import threading

import pytest
import torch

from lit_interns1_kernels.cpu_workers import run_parts, waiting_threads_sleep, worker_count


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_part_runs_once_with_one_thread_and_the_caller_keeps_its_number(two_threads):
    seen = {}

    def work(part):
        seen[part] = (threading.current_thread() is threading.main_thread(), torch.get_num_threads())

    run_parts(work, 2)
    assert seen == {0: (False, 1), 1: (False, 1)}
    assert torch.get_num_threads() == 2
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2], "threads that come later take what the user had set"


def test_a_single_part_runs_in_the_caller():
    seen = []
    run_parts(lambda part: seen.append((part, threading.current_thread())), 1)
    assert seen == [(0, threading.current_thread())]


@pytest.mark.parametrize("parts", [1, 2])
def test_parts_record_no_gradients(two_threads, parts):
    x = torch.ones(2, requires_grad=True)
    needed = []
    with torch.enable_grad():
        run_parts(lambda part: needed.append((x * 2).requires_grad), parts)
    assert needed == [False] * parts


def test_the_first_error_comes_back_after_all_parts_have_ended(two_threads):
    ended = []

    def work(part):
        if part == 0:
            raise ValueError("part 0")
        threading.Event().wait(0.1)
        ended.append(part)

    with pytest.raises(ValueError, match="part 0"):
        run_parts(work, 2)
    assert ended == [1]


def _in_child(connection):
    seen = []
    run_parts(seen.append, 2)
    connection.send(sorted(seen))


def test_a_forked_child_makes_workers_of_its_own(two_threads):
    run_parts(lambda part: None, 2)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(sender,), daemon=True)
    child.start()
    assert receiver.poll(30.0), "the child hangs"
    assert receiver.recv() == [0, 1]
    child.join(10.0)


def test_as_many_workers_as_threads_at_most_eight():
    before = torch.get_num_threads()
    try:
        for threads, workers in ((1, 1), (3, 3), (9, 8)):
            torch.set_num_threads(threads)
            assert worker_count() == workers
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("environment", "sleep"),
    [
        ({}, False),
        ({"GOMP_SPINCOUNT": "4000"}, True),
        ({"GOMP_SPINCOUNT": "infinity", "OMP_WAIT_POLICY": "passive"}, True),
        ({"GOMP_SPINCOUNT": "30000000000"}, False),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, True),
        ({"OMP_WAIT_POLICY": "active"}, False),
    ],
)
def test_whether_waiting_threads_sleep_is_read_from_the_environment(monkeypatch, environment, sleep):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert waiting_threads_sleep() is sleep
