"""Judges in worker processes, which can be stopped.

    this process  →  template: a fresh Python (no CUDA, threads or locks of ours) that loads the judges, once
                        ↓ fork, in about 0.1 s
                     workers: take (judge, prompts, texts, …), give verdicts
                     no verdicts before the deadline: SIGKILL and a new worker; the samples have the cause "timeout"

Python code cannot be interrupted from outside in any other way: a signal is handled by the main thread alone and waits
for C code to return, and a thread cannot be ended at all.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NoReturn

from lit_interns1.rollout.judges.base import Failure, Judge, Verdict, judge_samples
from lit_interns1.rollout.samples import Prompt, Sample

_CODE = "from lit_interns1.rollout.judges.workers import serve_template; serve_template({descriptor})"
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Task:
    """Samples for a judge; they succeed or run out of time together.

    Attributes:
        judge: Its number.
        timeout: Seconds for all of them.
    """

    judge: int
    timeout: float
    prompts: Sequence[Prompt]
    texts: Sequence[str]
    samples: Sequence[Sample]


def packed(judges: Sequence[Judge]) -> bytes:
    """Judges as bytes for another process.

    Raises:
        ValueError: If one cannot be sent; the message names it.
    """
    for judge in judges:
        name = type(judge).__name__
        advice = "workers = 0 runs judges in this process, without timeouts"
        try:
            data = pickle.dumps(judge)
        except Exception as error:
            raise ValueError(f"{name} cannot be sent to a worker process ({error}); {advice}") from None
        if b"__main__" in data:
            raise ValueError(
                f"{name}: it, or a function of it, is defined in the script that is run (__main__), which worker "
                f"processes do not load; move it into a module of its own; {advice}"
            )
    return pickle.dumps(list(judges))


# -- the side of the run ----------------------------------------------------------------------------------------------


class _Template:
    """The process that loads the judges and becomes workers.

    Raises:
        RuntimeError: If it cannot load the judges, or does not within `start_timeout` seconds.
    """

    def __init__(self, judges: bytes, start_timeout: float) -> None:
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(descriptor=theirs.fileno())], stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()], start_new_session=True, env={
                **os.environ, **_ONE_THREAD, "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            },
        )  # fmt: skip
        theirs.close()
        with contextlib.suppress(OSError):  # if it is gone, the answer says so
            self.connection.send_bytes(judges)
        problem = self._answer(start_timeout)
        if problem is not None:
            self.end()
            raise RuntimeError(f"the worker processes could not load the judges: {problem}")

    def _answer(self, timeout: float = 60.0) -> Any:
        try:
            if self.connection.poll(timeout):
                return pickle.loads(self.connection.recv_bytes())
            problem = f"did not answer within {timeout:g} s"
        except (EOFError, OSError):
            problem = f"ended with code {self.process.wait()}"
        self.end()
        raise RuntimeError(f"the process that starts judge workers {problem}")

    def fork(self) -> tuple[int, Connection]:
        """A new worker: its process id, and the connection to it."""
        ours, theirs = Pipe()
        with contextlib.suppress(OSError):
            self.connection.send_bytes(pickle.dumps(None))
            send_handle(self.connection, theirs.fileno(), self.process.pid)
        theirs.close()
        return self._answer(), ours

    def kill(self, worker: int) -> int:
        """Ends a worker, by its parent, which knows that the process id is still its own; how it ended."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(pickle.dumps(worker))
        return self._answer()

    def end(self) -> None:
        """Ends the process; it ends its workers first."""
        self.connection.close()
        try:
            self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Worker:
    """A worker and what it is doing."""

    def __init__(self, template: _Template) -> None:
        self.process, self.connection = template.fork()
        self.task: int | None = None
        self.deadline = 0.0

    def send(self, data: bytes) -> bool:
        """Whether it is there to listen."""
        try:
            self.connection.send_bytes(data)
        except OSError:
            return False
        return True


class JudgePool:
    """Worker processes that all hold the same judges.

    Args:
        judges: Who judges; picklable.
        workers: How many processes, at least 1.
        start_timeout: Seconds until the judges must be loaded.

    Raises:
        ValueError: If a judge cannot be sent to another process.
    """

    def __init__(self, judges: Sequence[Judge], workers: int = 2, start_timeout: float = 300.0) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.__setstate__((packed(judges), workers, start_timeout))

    def __getstate__(self) -> tuple[bytes, int, float]:  # copies start processes of their own
        return self._judges, self.size, self.start_timeout

    def __setstate__(self, state: tuple[bytes, int, float]) -> None:
        self._judges, self.size, self.start_timeout = state
        self._templates: list[_Template] = []  # one, once it is needed
        self._workers: list[_Worker] = []
        self._running = threading.Lock()
        weakref.finalize(self, _end, self._templates, self._workers)

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers that live."""
        return [worker.process for worker in self._workers]

    def run(self, tasks: Sequence[Task]) -> list[list[Verdict]]:
        """The verdicts of each task, in order. A second thread waits until the first is done.

        Raises:
            RuntimeError: If the judges cannot be loaded.
        """
        with self._running:
            found: dict[int, list[Verdict]] = {}
            waiting = deque(range(len(tasks)))
            while len(found) < len(tasks):
                self._assign(tasks, waiting, found)
                self._listen(tasks, found)
            return [found[place] for place in range(len(tasks))]

    def close(self) -> None:
        """Ends the processes; `run` would start new ones."""
        with self._running:
            _end(self._templates, self._workers)

    def _assign(self, tasks: Sequence[Task], waiting: deque[int], found: dict[int, list[Verdict]]) -> None:
        """Gives what waits to idle workers, and forks workers while there are too few."""
        idle = [worker for worker in self._workers if worker.task is None]
        while waiting and (idle or len(self._workers) < self.size):
            place = waiting.popleft()
            task = tasks[place]
            lean = [replace(sample, routed_experts=None) for sample in task.samples]
            try:
                data = pickle.dumps((task.judge, task.prompts, task.texts, lean))
            except Exception as error:
                found[place] = _failures(task, "error", f"not to be sent to a worker: {error}")
                continue
            worker = idle.pop() if idle else self._new_worker()
            if worker.send(data):
                worker.task, worker.deadline = place, time.monotonic() + task.timeout
            else:  # it died while it was idle
                waiting.appendleft(place)
                self._end_worker(worker)

    def _listen(self, tasks: Sequence[Task], found: dict[int, list[Verdict]]) -> None:
        """Waits for a verdict or for the next deadline."""
        busy = [worker for worker in self._workers if worker.task is not None]
        if not busy:
            return
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        heard = wait([worker.connection for worker in busy], patience)
        for worker in busy:
            place = worker.task
            assert place is not None
            task = tasks[place]
            if worker.connection in heard:
                try:
                    found[place] = pickle.loads(worker.connection.recv_bytes())
                    worker.task = None
                except (EOFError, OSError):
                    code = self._end_worker(worker)
                    found[place] = _failures(task, "error", f"the worker died, exit code {code}")
            elif time.monotonic() >= worker.deadline:
                self._end_worker(worker)
                found[place] = _failures(task, "timeout", f"no judgement after {task.timeout:g} s")

    def _new_worker(self) -> _Worker:
        if not self._templates:
            self._templates.append(_Template(self._judges, self.start_timeout))
        self._workers.append(_Worker(self._templates[0]))
        return self._workers[-1]

    def _end_worker(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        worker.connection.close()
        return self._templates[0].kill(worker.process)


def _failures(task: Task, cause: Any, message: str) -> list[Verdict]:
    return [Failure(cause, message[:500])] * len(task.samples)


def _end(templates: list[_Template], workers: list[_Worker]) -> None:
    while workers:
        workers.pop().connection.close()
    while templates:
        templates.pop().end()


# -- the side of the workers ------------------------------------------------------------------------------------------


def serve_template(descriptor: int) -> None:
    """The life of the template.

    Args:
        descriptor: File descriptor of its end of the pipe.
    """
    connection, workers = Connection(descriptor), set[int]()
    try:
        judges: list[Judge] = pickle.loads(connection.recv_bytes())
    except Exception as error:
        connection.send_bytes(pickle.dumps(f"{type(error).__name__}: {error}"))
        return
    connection.send_bytes(pickle.dumps(None))
    try:
        while True:
            wanted: int | None = pickle.loads(connection.recv_bytes())
            if wanted is None:
                theirs = recv_handle(connection)
                sys.stdout.flush()
                answer = os.fork()
                if answer == 0:
                    connection.close()
                    _serve_worker(Connection(theirs), judges)
                os.close(theirs)
                workers.add(answer)
            else:
                answer = _kill(wanted)
                workers.discard(wanted)
            connection.send_bytes(pickle.dumps(answer))
    except (EOFError, OSError):  # the run is over
        for worker in workers:
            _kill(worker)
        os._exit(0)


def _kill(worker: int) -> int:
    """Ends a worker and what it started; how it ended."""
    for kill in (os.killpg, os.kill):  # it may not have a group of its own yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(worker, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])


def _serve_worker(connection: Connection, judges: Sequence[Judge]) -> NoReturn:
    """The life of a worker."""
    os.setsid()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        while True:
            place, prompts, texts, samples = pickle.loads(connection.recv_bytes())
            try:
                verdicts = judge_samples(judges[place], prompts, texts, samples)
            except BaseException as error:  # such as SystemExit: the worker lives on
                verdicts = [Failure("error", f"{type(error).__name__}: {error}"[:500])] * len(samples)
            connection.send_bytes(pickle.dumps(verdicts))
    finally:  # the run is over, or the message was no message
        os._exit(1)


def _end_with_parent(parent: int) -> None:
    """A worker whose parent is gone would judge for nobody."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
