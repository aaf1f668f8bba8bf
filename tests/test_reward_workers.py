"""Isolation: no completion hangs, blocks, fools or outlives its grader.  Real processes throughout."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import rewards
from rewards import Item, WorkerPool, grade, symbolic, worker
from rewards.grading import VERDICTS
from rewards.pool import Task
from rewards.strictness import MODES

HOSTILE = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "hostile_public.jsonl"
SLOW_SUM = r"\boxed{\log_{2}(10^{10^{7}})}"  # sympy works on it for minutes
SYMBOLIC = [(rf"\boxed{{{k}\ln 2}}", rf"\ln {2**k}") for k in range(2, 40)]


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _forget():
    VERDICTS.clear()


def worker_processes(pool):
    nursery = psutil.Process(pool._nursery.pid)
    return nursery, nursery.children()


def wait_until(condition, seconds=10.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "still not so"
        time.sleep(0.02)


def submit(pool, answer, gold, mode="training"):
    task = Task(gold, answer, mode=mode)
    pool.submit([[task]])
    return task.future


def test_an_answer_that_never_ends_costs_one_item_and_no_worker(pool):
    items = [(SLOW_SUM, r"\ln 5"), *SYMBOLIC]
    results = grade(items, pool=pool)
    assert [r.status for r in results] == ["timeout"] + ["correct"] * len(SYMBOLIC)
    assert results[0].decided_by == "cpu deadline"
    assert pool.counters.kills == pool.counters.crashes == 0


def test_a_worker_stuck_in_c_is_killed_at_the_wall_deadline_and_the_rest_goes_on(pool, monkeypatch):
    """A stopped process stands for a C loop that looks at no signal."""
    monkeypatch.setitem(
        MODES, "training", MODES["training"].__class__(**vars(MODES["training"]) | {"hard_wall_seconds": 1.0})
    )
    grade(SYMBOLIC[:2], pool=pool)
    stopped = pool.process_ids[0]
    os.kill(stopped, signal.SIGSTOP)
    started = time.monotonic()
    tasks = [Task(gold, answer[7:-1]) for answer, gold in SYMBOLIC]
    pool.submit([[task] for task in tasks])
    statuses = [task.future.result(timeout=20)["status"] for task in tasks]
    assert statuses.count("timeout") == 1
    assert statuses.count("correct") == len(tasks) - 1
    assert time.monotonic() - started < 10
    assert pool.counters.kills == 1
    wait_until(lambda: not psutil.pid_exists(stopped))


def test_the_death_of_a_worker_costs_one_item(pool):
    grade(SYMBOLIC[:2], pool=pool)
    crashes = pool.counters.crashes
    futures = [submit(pool, SLOW_SUM[7:-1], r"\ln 5"), submit(pool, SLOW_SUM[7:-1], r"\ln 6")]
    time.sleep(0.4)
    os.kill(pool.process_ids[0], signal.SIGKILL)
    statuses = sorted(future.result(timeout=20)["status"] for future in futures)
    assert statuses == ["crashed", "timeout"]
    assert pool.counters.crashes == crashes + 1
    assert all(result.correct for result in grade(SYMBOLIC, pool=pool))


def test_the_death_of_the_nursery_is_survived(pool):
    grade(SYMBOLIC[:2], pool=pool)
    before = pool._nursery.pid
    os.kill(before, signal.SIGKILL)
    pool._nursery.wait(timeout=10)
    VERDICTS.clear()
    statuses = [result.status for result in grade(SYMBOLIC, pool=pool)]
    assert set(statuses) <= {"correct", "crashed"}
    assert statuses.count("crashed") <= pool.workers
    assert pool._nursery.pid != before


def test_memory_is_limited_and_the_next_items_do_not_suffer():
    limit = 200 * 2**20
    small = WorkerPool(1, memory_bytes=limit)
    try:
        results = grade([(r"\boxed{\gcd(2^{10^{10}}, 6)}", "5n"), *SYMBOLIC[:3]], pool=small)
        assert not results[0].correct
        assert all(result.correct for result in results[1:])
        assert small.counters.rss_bytes < limit
        assert psutil.Process(small.process_ids[0]).rlimit(psutil.RLIMIT_AS) == (limit, limit)
    finally:
        small.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "memory"),
        (RecursionError(), "unparseable"),
        (ArithmeticError("odd"), "unparseable"),
        (symbolic.UnparseableError("x", is_gold=False), "unparseable"),
        (symbolic.UnparseableError("x", is_gold=True), "gold_unparseable"),
    ],
)
def test_whatever_sympy_raises_becomes_a_status(monkeypatch, error, status):
    def fail(task):
        raise error

    monkeypatch.setattr(worker, "judge", fail)
    previous = signal.getsignal(signal.SIGPROF)
    try:
        assert worker.run(Task("5", "5").message(), worker.Deadline())["status"] == status
    finally:
        signal.signal(signal.SIGPROF, previous)


def test_workers_that_cannot_be_confined_are_told_of_once(monkeypatch, caplog):
    receive = rewards.wire.receive

    def refused(connection):
        answer = receive(connection)
        return answer | {"missing": "the system call filter was refused"} if "hello" in answer else answer

    monkeypatch.setattr(rewards.pool.wire, "receive", refused)
    pool = WorkerPool(2)
    monkeypatch.setattr(rewards.grading, "_pool", pool)
    try:
        results = grade(SYMBOLIC)
        wait_until(lambda: len(pool.process_ids) == 2)
        metrics = rewards.health.metrics(results)
    finally:
        pool.close()
    [record] = caplog.records
    assert "UNCONFINED, able to open sockets" in record.message
    assert "the system call filter was refused" in record.message
    assert metrics["worker_unconfined"] == 1.0


def test_workers_are_confined(tmp_path):
    """Asked of a process that went through the same doors, for a worker answers about answers only."""
    code = """
import os, socket, sys, subprocess
from rewards import sandbox
missing = sandbox.confine(2**30)
def refused(act):
    try:
        act()
    except OSError as error:
        return error.errno
    return 0
import json
print(json.dumps([missing, refused(lambda: socket.socket()), refused(lambda: os.execv("/bin/true", ["true"])),
                  refused(lambda: open(sys.argv[1], "wb", buffering=0).write(b"x" * 10))]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True)
    missing, *errors = json.loads(done.stdout)
    if missing:
        pytest.skip(missing)
    assert errors[:2] == [1, 1]  # EPERM
    assert errors[2] == 27  # EFBIG
    assert (tmp_path / "file").read_bytes() == b""


def test_a_worker_has_no_core_dump_no_file_and_python_integers(pool):
    grade(SYMBOLIC[:2], pool=pool)
    nursery, workers = worker_processes(pool)
    assert nursery.environ()["SYMPY_GROUND_TYPES"] == "python"
    assert nursery.environ()["CUDA_VISIBLE_DEVICES"] == ""
    for process in workers:
        assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)


def test_a_worker_is_replaced_after_its_share_of_items():
    pool = WorkerPool(1, max_tasks=10)
    try:
        assert all(result.correct for result in grade(SYMBOLIC, pool=pool))
        assert pool.counters.recycled >= 3
        wait_until(lambda: len(worker_processes(pool)[1]) == 1, seconds=5)
    finally:
        pool.close()


def test_one_golds_answers_go_to_one_worker(pool):
    """So that its parsed gold and its warm caches are used: the same home for the same gold, in every batch."""
    seen = []
    original = WorkerPool._run

    def spy(self, worker, tasks):
        seen.append((worker.number, {task.gold for task in tasks}, len(tasks)))
        return original(self, worker, tasks)

    WorkerPool._run = spy
    try:
        grade([(rf"\boxed{{{k}\ln 2}}", r"\ln 8") for k in range(2, 10)], pool=pool)
    finally:
        WorkerPool._run = original
    assert seen == [(seen[0][0], {r"\ln 8"}, 8)]


def test_the_callers_signal_handlers_and_alarm_stay_untouched(pool):
    fired = []
    previous = signal.signal(signal.SIGALRM, lambda *_: fired.append(True))
    handlers = {
        number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    }
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        grade([(SLOW_SUM, r"\ln 5"), *SYMBOLIC], pool=pool)
        assert fired == [True]
        assert handlers == {number: signal.getsignal(number) for number in handlers}
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_budget_bounds_the_caller(pool):
    started = time.monotonic()
    results = grade(
        [(SLOW_SUM, rf"\ln {k}") for k in range(5, 15)] + [(r"\boxed{1}", "1")], budget_seconds=0.5, pool=pool
    )
    assert time.monotonic() - started < 2
    assert {result.status for result in results[:-1]} == {"timeout"}
    assert results[-1].correct
    VERDICTS.clear()
    assert grade(SYMBOLIC[:1], pool=pool)[0].correct


def test_a_budget_bounds_the_callers_own_part_too(pool):
    megabytes = r"\boxed{" + "{}" * 500_000 + "}"  # half a second of braces each
    started = time.monotonic()
    results = grade([(megabytes, "1")] * 200, budget_seconds=0.5, pool=pool)
    assert time.monotonic() - started < 20
    assert results[-1].decided_by == "the caller's budget was spent"


@pytest.mark.parametrize("where", ["main thread", "thread", "asyncio"])
def test_verdicts_do_not_depend_on_where_they_are_asked_for(pool, where):
    items = [*SYMBOLIC, (SLOW_SUM, "x^n"), (r"\boxed{2}", "3")]
    if where == "main thread":
        results = grade(items, pool=pool)
    elif where == "thread":
        box = []
        thread = threading.Thread(target=lambda: box.append(grade(items, pool=pool)))
        thread.start()
        thread.join()
        [results] = box
    else:
        results = asyncio.run(rewards.agrade(items, pool=pool))
    assert [r.status for r in results] == ["correct"] * len(SYMBOLIC) + ["timeout", "incorrect"]


def test_the_event_loop_runs_on_while_workers_grade(pool):
    async def tick():
        gaps, last = [], time.perf_counter()
        while True:
            await asyncio.sleep(0.01)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    async def main():
        ticker = asyncio.create_task(tick())
        await rewards.agrade([(SLOW_SUM, r"\ln 5"), *SYMBOLIC], pool=pool)
        ticker.cancel()

    started = time.perf_counter()
    asyncio.run(main())
    assert time.perf_counter() - started > 0.5


def test_several_threads_share_one_pool(pool):
    outcomes = {}

    def work(name):
        outcomes[name] = [r.correct for r in grade([(a.replace("ln", r"ln "), g) for a, g in SYMBOLIC], pool=pool)]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(verdicts) for verdicts in outcomes.values())
    assert len(outcomes) == 6


def test_closing_leaves_no_process_and_no_zombie():
    pool = WorkerPool(2)
    grade(SYMBOLIC, pool=pool)
    nursery, workers = worker_processes(pool)
    pids = [nursery.pid, *(worker.pid for worker in workers)]
    pool.close()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_sigterm_that_every_process_of_a_slurm_step_gets_leaves_the_workers_to_their_caller():
    pool = WorkerPool(2)
    grade(SYMBOLIC, pool=pool)
    nursery, workers = worker_processes(pool)
    for process in (nursery, *workers):
        process.terminate()
    time.sleep(0.5)
    assert all(process.is_running() and process.status() != "zombie" for process in (nursery, *workers))
    pool.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_worker_dies_with_its_parent_even_in_the_middle_of_an_item(how, tmp_path):
    """The parent leaves a process behind that holds a copy of its control socket: the workers go all the same."""
    code = f"""
import subprocess, time, rewards
from rewards.pool import Task
pool = rewards.default_pool()
rewards.grade({SYMBOLIC[:4]!r})
control = pool._control.fileno()
subprocess.Popen(["sleep", "60"], pass_fds=[control], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
pool.submit([[Task(r"\\ln 5", {SLOW_SUM[7:-1]!r}, mode="evaluation")]])
print(pool._nursery.pid, *pool.process_ids.values(), flush=True)
time.sleep(60 if {how is not None} else 0.3)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) >= 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        time.sleep(0.2)
        if how is not None:
            parent.send_signal(how)
        parent.wait(timeout=15)
        wait_until(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the process it left behind
        parent.stdout.close()


def test_a_forked_process_grades_with_workers_of_its_own():
    code = f"""
import os, rewards
items = {SYMBOLIC[:6]!r}
assert all(r.correct for r in rewards.grade(items))
child = os.fork()
if child == 0:
    rewards.grading.VERDICTS.clear()
    os._exit(0 if all(r.correct for r in rewards.grade(items)) else 1)
assert os.waitpid(child, 0)[1] == 0
rewards.grading.VERDICTS.clear()
assert all(r.correct for r in rewards.grade(items))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_workers_that_cannot_start_are_an_error_with_the_reason(monkeypatch, tmp_path):
    (tmp_path / "sympy.py").write_text("raise ImportError('this sympy is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    pool = WorkerPool(1)
    with pytest.raises(rewards.WorkersError, match="this sympy is broken"):
        grade([(r"\boxed{3\ln 2}", r"\ln 8")], pool=pool)
    pool.close()


@pytest.mark.parametrize("workers", [0, -1])
def test_a_pool_needs_workers(workers):
    with pytest.raises(ValueError, match=f"workers={workers}"):
        WorkerPool(workers)


def load_hostile():
    if not HOSTILE.is_file():
        pytest.skip(f"{HOSTILE} is not beside this checkout")
    rows = [json.loads(line) for line in HOSTILE.read_text().splitlines()]
    # `expr` is a Python expression of our own file that builds a completion too long to be written out
    return [(row.get("note"), row["completion"] if "completion" in row else eval(row["expr"]), row) for row in rows]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("mode", list(MODES))
def test_the_hostile_file_between_good_items(mode):
    rows = load_hostile()
    items, good = [], []
    for index, (_, completion, row) in enumerate(rows):
        items.append(Item(completion, row["gold"]))
        good.append(len(items))
        items.append(
            Item(
                *[
                    (rf"\boxed{{{index + 2}\ln 2}}", rf"\ln {2 ** (index + 2)}"),
                    (rf"\boxed{{{index}/7}}", f"{2 * index}/14"),
                ][index % 2]
            )
        )
    pool, stalls, box = WorkerPool(2), [], []
    thread = threading.Thread(target=lambda: box.append(grade(items, mode=mode, pool=pool)))
    thread.start()
    while thread.is_alive():
        before = time.perf_counter()
        time.sleep(0.005)
        stalls.append(time.perf_counter() - before)
    pool.close()
    [results] = box
    assert all(results[index].correct for index in good)
    rewarded = [
        note for (note, _, row), r in zip(rows, results[::2], strict=True) if row["expected"] is False and r.correct
    ]
    assert rewarded == []
    assert max(result.seconds for result in results) < MODES[mode].hard_wall_seconds + 1
    assert pool.counters.rss_bytes < 2**30
    print(
        f"\n{mode}: worst item {max(r.seconds for r in results):.1f} s, longest stall {max(stalls):.3f} s, "
        f"{pool.counters}"
    )


@pytest.mark.slow
@pytest.mark.alone
def test_memory_stays_flat_over_20000_items():
    pool = WorkerPool(2)
    me = psutil.Process()
    sizes = []
    try:
        for batch in range(20):
            items = []
            for index in range(batch * 1_000, (batch + 1) * 1_000):
                if index % 4:
                    items.append((rf"so \boxed{{\frac{{{index}}}{{7}}+x^{index % 9}}}", f"x^{index % 9}+{index}/7"))
                else:
                    items.append((rf"so \boxed{{\ln {index + 2}+x}}", rf"x+\ln {index + 2}"))
            assert all(result.correct for result in grade(items, pool=pool))
            workers = sum(process.memory_info().rss for process in worker_processes(pool)[1])
            sizes.append((me.memory_info().rss / 2**20, workers / 2**20))
    finally:
        pool.close()
    print("\nparent, workers in MiB after each 1000 items:", [f"{p:.0f}/{w:.0f}" for p, w in sizes])
    parent, workers = zip(*sizes, strict=True)
    assert max(parent[10:]) - max(parent[5:10]) < 15  # MiB; the caches are full after the first thousands
    assert max(workers) < 2 * 300
    assert max(workers[10:]) < max(workers[:10]) + 40
