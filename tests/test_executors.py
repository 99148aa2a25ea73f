"""What a run of an experiment owes on any executor: the rows of one process, and
only the jobs of a worker that is lost"""

import json
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_tree import ROOT, run

from symtele import experiments
from symtele.experiments import Experiment, differences, environment, grid
from symtele.whitening_study import linear

COMMITTED = ROOT / "nbs/results"
SMALL = linear.config | dict(lrs=[0.01], steps=20, seeds=[0, 1])


def far_from_the_end(cfg):
    "Deep linear networks whose excess is more than rounding, which varies"
    arms = "base", "random", "rescale", "turned"
    return [job for job in linear.jobs(cfg) if job["arm"] in arms]


sweep = replace(linear, config=SMALL, jobs=far_from_the_end)
UNLUCKY, *_, DOOMED = sweep.jobs(SMALL)[1:8]


def die():
    "As a process does when the machine has no memory left"
    os.kill(os.getpid(), signal.SIGKILL)


def live_or_die(cfg, **job):
    "A run of the sweep: one job dies the first time, another until it is spared"
    folder = Path(cfg["folder"])
    if job == UNLUCKY and not (folder / "died").exists():
        (folder / "died").touch()
        die()
    if job == DOOMED and (folder / "raises").exists():
        raise ValueError("no such thing")
    if job == DOOMED and not (folder / "spared").exists():
        with open(folder / "tries", "a") as tries:
            tries.write("x")
        die()
    return linear.run_one(cfg, **job)


def mortal(folder):
    "The sweep, two jobs of which take their process along"
    config = SMALL | dict(folder=str(folder))
    return replace(sweep, config=config, run_one=live_or_die)


def saved(folder, experiment):
    "The rows in a results file, whole or not"
    return json.loads((folder / f"{experiment.name}.json").read_text())["rows"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "What the rows of the sweep are in one process"
    return sweep.run(tmp_path_factory.mktemp("alone"), workers=0)


def same(rows, alone):
    "Whether rows agree, but for the last of the six digits that a file keeps"
    return not differences(rows, alone, rtol=1e-5)


def tries_of_the_doomed(folder, alone, after, **options):
    """How often the job was tried whose worker never lives through it. It is
    named, it costs itself alone, and the next run makes its row and no other.
    In between it raises, which is an error of its own"""
    e = mortal(folder)
    doomed = re.escape(str(DOOMED))
    with pytest.raises(
        RuntimeError, match=f"lost 1 of 16 jobs, such as {doomed}"
    ):
        e.run(folder, **options)
    rows = saved(folder, e)
    assert [e.job(r) for r in rows] == [j for j in e.jobs(SMALL) if j != DOOMED]
    (folder / "raises").touch()
    with pytest.raises(ValueError, match="no such thing") as raised:
        e.run(folder, **options)
    assert raised.value.__notes__ == [f"in the job {DOOMED}"]
    (folder / "raises").rename(folder / "spared")
    again = e.run(folder, **options | after)
    assert same(again, alone)
    assert [r for r in again if e.job(r) != DOOMED] == rows
    return len((folder / "tries").read_text())


def test_processes_that_die(tmp_path, alone):
    "A job is tried three times; the other processes go on with the others"
    assert tries_of_the_doomed(tmp_path, alone, dict(workers=0), workers=2) == 3
    assert (tmp_path / "died").exists()


class Dead(Executor):
    "Loses whatever it is given"

    given = 0

    def submit(self, *call):
        self.given += 1
        future = Future()
        future.set_exception(OSError("no workers"))
        return future


def test_an_executor_that_loses_all(tmp_path):
    "Is asked no more after three jobs; the next run makes them"
    dead = Dead()
    with pytest.raises(RuntimeError, match="lost 3 of 8 .*'seed': 0.*no workers"):
        draws.run(tmp_path, 1, dead)
    assert dead.given == 3
    assert len(draws.run(tmp_path, workers=0)) == 8


@pytest.fixture(scope="module")
def cluster():
    "Two workers of Dask on this machine, processes of one thread"
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    from distributed import Client

    with Client(cluster) as client:
        yield client


def test_dask_workers_that_die(tmp_path, alone, client):
    "The same rows from a cluster, one of its two workers killed on the way"
    (tmp_path / "spared").touch()
    workers = set(client.run(os.getpid).values())
    rows = mortal(tmp_path).run(tmp_path, executor=client.get_executor())
    assert same(rows, alone)
    assert (tmp_path / "died").exists()
    client.wait_for_workers(2)
    left = workers & set(client.run(os.getpid).values())
    assert len(workers) == 2 and len(left) == 1


def test_dask_gives_up_on_a_job(tmp_path, alone, client, monkeypatch):
    "It costs itself alone, and the next run may use the same client"
    (tmp_path / "died").touch()
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    # One job at a time: Dask suspects whatever a worker had when it died.
    options = dict(workers=1, executor=client.get_executor())
    assert tries_of_the_doomed(tmp_path, alone, {}, **options) == 1


def test_command_line_on_dask(tmp_path, cluster):
    "Rows that are missing are made on the cluster, and agree"
    name = "test_functions_paper"
    for path in COMMITTED.glob("test_functions*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = json.loads((COMMITTED / f"{name}.json").read_text())
    file["environments"] = [dict(torch="older")]
    file["rows"] = [r for r in file["rows"] if r["problem"] != "booth"]
    (tmp_path / f"{name}.json").write_text(json.dumps(file))
    module = "python", "-m", "symtele.experiments", "test_functions"
    options = "--into", str(tmp_path), "--dask", cluster.scheduler_address
    before = cluster.scheduler.transition_counter
    printed = run(*module, *options, cwd=ROOT, package=ROOT)
    assert cluster.scheduler.transition_counter > before  # they were made there
    assert printed.count("every number agrees") == 3
    assert re.search(r"^All of it took .* \(about [\d.]+ here\)$", printed, re.M)
    made = json.loads((tmp_path / f"{name}.json").read_text())["environments"]
    assert made == [dict(torch="older"), environment()]


def test_dask_is_not_there(monkeypatch):
    "The error names the extra"
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SystemExit, match=r"pip install symtele\[dask\]"):
        experiments._main(["mlp", "--dask", "tcp://127.0.0.1:1"])


@pytest.mark.parametrize("address", ["nowhere://a", "tcp://127.0.0.1:1"])
def test_dask_does_not_answer(address):
    "The error names the address"
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "100ms"}),
        pytest.raises(SystemExit, match=f"--dask {address} reaches no Dask"),
    ):
        experiments._main(["mlp", "--dask", address])


def draw(cfg, seed):
    "Numbers from the one stream that a process has; its threads for products"
    torch.manual_seed(seed)
    numbers = []
    for _ in range(20):
        numbers.append(torch.rand(()).item())
        time.sleep(1e-3)  # another thread may go on here
    return dict(numbers=numbers, threads=torch.get_num_threads())


draws = Experiment("draws", {}, lambda cfg: grid(seed=range(8)), draw)


def test_threads_take_turns(tmp_path, alone, monkeypatch):
    "Rows of threads are those of one process, though these share random numbers"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as threads:
        assert same(sweep.run(tmp_path, executor=threads), alone)
        rows = draws.run(tmp_path, executor=threads)
        assert rows == draws.run(tmp_path / "alone", workers=0)
        assert {r["threads"] for r in rows} == {1}
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(experiments, "_TURN", nullcontext())  # control
        assert rows != draws.run(tmp_path / "mixed", executor=threads)
    torch.set_num_threads(before)


def test_rows_name_the_machine_that_made_them(tmp_path, monkeypatch):
    "Which is another one where a worker is"

    def named(device):
        return dict(machine=threading.current_thread().name)

    monkeypatch.setattr(experiments, "environment", named)
    few = replace(draws, jobs=lambda cfg: grid(seed=range(1)))
    few.run(tmp_path, workers=0)
    with ThreadPoolExecutor(1, thread_name_prefix="worker") as threads:
        draws.run(tmp_path, executor=threads)
    made = [dict(machine="MainThread"), dict(machine="worker_0")]
    assert draws.made(tmp_path) == made


class Counting(ThreadPoolExecutor):
    "Threads that remember how many calls they had at most"

    most = open = 0

    def submit(self, *call):
        self.open += 1
        self.most = max(self.most, self.open)
        future = super().submit(*call)
        future.add_done_callback(self.close)
        return future

    def close(self, future):
        self.open -= 1


def test_workers_are_jobs_at_once(tmp_path):
    "All of them on an executor, or as many as the experiment says"
    most = []
    for workers in (None, 0, 1, 3):
        with Counting(1) as threads:
            draws.run(tmp_path / str(workers), workers, threads)
        most.append(threads.most)
    assert most == [8, 8, 1, 3]


def until(path):
    "Come back when a file is there"
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def fail(cfg, n):
    "The first job fails while the second one runs"
    folder = Path(cfg["folder"])
    if n == 0:
        until(folder / "begun")
        (folder / "failing").touch()
        raise ValueError("no such thing")
    (folder / "begun").touch()
    until(folder / "failing")
    return dict(square=n * n)


def test_a_job_that_raises(tmp_path, monkeypatch):
    "Its own error comes, with the job; what ran beside it is kept, the rest not"
    monkeypatch.setattr(experiments, "_TURN", nullcontext())
    jobs = grid(n=range(1000))
    e = Experiment("fails", dict(folder=str(tmp_path)), lambda cfg: jobs, fail)
    with (
        ThreadPoolExecutor(2) as threads,
        pytest.raises(ValueError, match="no such thing") as raised,
    ):
        e.run(tmp_path, 2, threads)
    assert raised.value.__notes__ == ["in the job {'n': 0}"]
    rows = saved(tmp_path, e)
    assert rows[0] == dict(n=1, square=1) and len(rows) < 500


def interrupt(cfg, n):
    "The third job is running when Ctrl-C is pressed"
    main = threading.main_thread().ident
    if n == 2:
        while sys._current_frames()[main].f_code.co_name != "wait":
            time.sleep(1e-3)
        signal.pthread_kill(main, signal.SIGINT)
    return dict(square=n * n)


def test_interrupted(tmp_path):
    "What was finished or running is saved, and a further run makes the rest"
    # what a shell starts in the background ignores the signal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    e = Experiment("stops", {}, lambda cfg: grid(n=range(9)), interrupt)
    with ThreadPoolExecutor(1) as threads, pytest.raises(KeyboardInterrupt):
        e.run(tmp_path, 1, threads)
    assert [r["n"] for r in saved(tmp_path, e)] == [0, 1, 2]
    rest = replace(e, run_one=lambda cfg, n: dict(square=n * n))
    assert [r["n"] for r in rest.run(tmp_path, workers=0)] == list(range(9))


def test_no_executor(tmp_path, client):
    "A Dask client has futures of its own; the error says where the executor is"
    with pytest.raises(
        TypeError, match=r"client\.get_executor\(\).* got <Client"
    ):
        draws.run(tmp_path, executor=client)
    assert isinstance(client.get_executor(), Executor)


def test_the_extra(monkeypatch):
    "Who asks for symtele[dask] gets it, and so do these tests"
    asked = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", asked.update)
    exec((ROOT / "setup.py").read_text(), {})
    assert asked["extras_require"]["dask"] == ["distributed"]
    assert "distributed" in asked["extras_require"]["dev"]
