import ctypes
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from fedgram.kernels import (
    factor_combine,
    factor_cross,
    factor_gram,
    ghost_gram,
    grad_combine,
    grad_gram,
    native_calls,
    spread_over_jobs,
)
from fedgram.kernels._dispatch import resolve
from fedgram.kernels._stacks import Stacks
from fedgram_testing.factor_ops import draw
from fedgram_testing.gradients import TYPES, errors, gradients, threads

built = pytest.mark.skipif(native_calls.missing() is not None, reason=str(native_calls.missing()))
SWITCHED_OFF = os.environ.get("FEDGRAM_NATIVE") == "0"


def test_it_is_built_where_there_is_a_compiler():
    if SWITCHED_OFF or shutil.which("cc") is None:
        pytest.skip("switched off, or no compiler here")
    assert native_calls.missing() is None


@built
def test_auto_takes_it_on_a_cpu_for_operations_that_have_loops():
    t = [torch.ones(2)]
    assert resolve("auto", t, native=True) == "native"
    assert resolve("auto", t) == "torch"
    assert resolve("torch", t, native=True) == "torch"


@built
def test_an_order_that_cannot_be_followed():
    with pytest.raises(RuntimeError, match="backend='native': this operation has no compiled CPU loops"):
        ghost_gram(torch.ones(4, 2), torch.ones(4, 2), torch.tensor([0, 2, 4]), backend="native")
    with pytest.raises(RuntimeError, match="backend='native': tensors are on meta"):
        grad_gram([[torch.ones(2, device="meta")]], backend="native")


def test_switched_off_it_is_not_used():
    code = (
        "import torch; from fedgram.kernels import grad_gram, native_calls; g = [[torch.ones(3)]]\n"
        "assert float(grad_gram(g).n0) == 3 and 'FEDGRAM_NATIVE' in native_calls.missing()\n"
        "try: grad_gram(g, backend='native')\n"
        "except RuntimeError as e: print(e)"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | {"FEDGRAM_NATIVE": "0"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "backend='native': switched off by FEDGRAM_NATIVE=0"


@built
@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("dtype", TYPES)
def test_every_instruction_set_gives_the_same_products(level, dtype, monkeypatch):
    if level > native_calls.level():
        pytest.skip("this CPU has no such instructions")
    monkeypatch.setattr(native_calls, "level", lambda: level)
    G = gradients(7, dtype=dtype)
    assert max(errors(grad_gram(G, precise=True, backend="native"), G)) < 1e-12
    assert max(errors(grad_gram(G, backend="native"), G)) < 2e-6
    v = torch.linspace(-1, 2, 7, dtype=torch.float64)
    for got, want in zip(grad_combine(G, v, backend="native"), grad_combine(G, v, backend="torch"), strict=True):
        # both round sums of seven terms once: at most one unit of the type apart
        assert torch.allclose(got.double(), want.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    B, A = draw([3, 5, 8], [(70, 33), (9, 600)], dtype)
    P = [torch.randn(16, 6, dtype=torch.float64) for _ in B]
    for op in (
        lambda b: factor_gram(B, A, backend=b),
        lambda b: factor_cross(B, A, [bs[0] for bs in B], [as_[1] for as_ in A], backend=b),
        lambda b: factor_combine(B, A, P, [p.T for p in P], dtype=torch.float64, backend=b),
    ):
        for got, want in zip([x for s in op("native") for x in s], [x for s in op("torch") for x in s], strict=True):
            assert torch.allclose(got, want, rtol=1e-12, atol=1e-10)


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_to_even_and_keep_what_is_special(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.ones(1, dtype=torch.float64)
    [back] = grad_combine([[bits]], one, backend="native")
    assert torch.equal(back.isnan(), bits.isnan())
    numbers = ~bits.isnan()
    assert torch.equal(back[numbers] + 0, bits[numbers] + 0)
    finite = bits[bits.isfinite()].double().sort().values
    between = torch.cat([(finite[1:] + finite[:-1]) / 2, finite * 1.0001]).float()
    narrow = [torch.empty(len(between), dtype=dtype)]
    grad_combine([[between]], one, out=narrow, backend="native")
    assert torch.equal(narrow[0], between.to(dtype))


@built
def test_bits_do_not_follow_the_number_of_threads():
    B, A = draw([8] * 10, [(2048, 3000), (40, 9000)], torch.float32)
    P = [torch.randn(80, 8, dtype=torch.float64) for _ in B]
    G = gradients(9, [(700_001,), (33,)])

    def everything():
        out = [x for side in factor_gram(B, A) for x in side]
        out += [x for side in factor_cross(B, A, [b[0] for b in B], [a[0] for a in A]) for x in side]
        out += [x for side in factor_combine(B, A, P, [p.T for p in P]) for x in side]
        return out + list(grad_gram(G)) + grad_combine(G, torch.linspace(0, 1, 9, dtype=torch.float64))

    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(everything())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@built
def test_loops_keep_their_threads_while_torch_has_one():
    enough, alone = native_calls.THREADED_WORK, native_calls.SPREAD_WORK
    assert alone < enough
    with threads(3):
        with spread_over_jobs():
            assert torch.get_num_threads() == 1
            assert native_calls.threads_for(8, enough) == 3
            # no thread of torch can be in the way, so less work is worth one
            assert [native_calls.threads_for(8, alone), native_calls.threads_for(8, alone - 1)] == [3, 1]
            with spread_over_jobs():
                assert native_calls.threads_for(8, enough) == 3
        assert torch.get_num_threads() == 3
        assert native_calls.threads_for(8, alone) == 1
        assert [
            native_calls.threads_for(8, enough),
            native_calls.threads_for(2, enough),
            native_calls.threads_for(8, 9),
        ] == [3, 2, 1]
    with pytest.raises(ValueError, match="inside"), threads(2), spread_over_jobs():
        raise ValueError("inside")
    with threads(5):
        assert native_calls.threads_for(8, enough) == 5


@built
@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_work_of_two_threads_gives_torch_its_threads_back(first_out):
    entered, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    after = [0, 0]

    def work(at):
        with spread_over_jobs():
            with spread_over_jobs():
                entered[at].set()
            assert torch.get_num_threads() == 1
            leave[at].wait(10)
        after[at] = torch.get_num_threads()

    with threads(3):
        both = [threading.Thread(target=work, args=(at,)) for at in (0, 1)]
        for at in (0, 1):
            both[at].start()
            entered[at].wait(10)
        for at in (first_out, 1 - first_out):
            assert native_calls.threads_for(8, native_calls.SPREAD_WORK) == 3
            leave[at].set()
            both[at].join(10)
        assert after == [3, 3]
        assert native_calls.threads_for(8, native_calls.SPREAD_WORK) == 1


@built
def test_a_thread_that_comes_later_has_one_thread_although_another_has_left():
    inside, left = threading.Event(), threading.Event()
    seen = []

    def first_asked_of_torch_here():
        with spread_over_jobs():
            inside.set()
            left.wait(10)
            seen.append(torch.get_num_threads())
            helper = threading.Thread(target=lambda: (native_calls.join_spread(), seen.append(torch.get_num_threads())))
            helper.start()
            helper.join(10)

    with threads(3):
        thread = threading.Thread(target=first_asked_of_torch_here)
        with spread_over_jobs():
            thread.start()
            inside.wait(10)
        left.set()
        thread.join(10)
        assert seen == [1, 1]
        native_calls.join_spread()  # nobody is within: nothing to join
        assert torch.get_num_threads() == 3


@built
@pytest.mark.parametrize("count", [1, 3, 64])
def test_every_job_is_done_once_in_a_thread_with_its_own_scratch(count):
    lock, seen, scratches = threading.Lock(), [], {}
    barrier = threading.Barrier(count)

    @ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 2)
    def entry(level, wide, jobs, jobs_count, next_job, work):
        with lock:
            scratches[threading.get_ident()] = work
        barrier.wait(20)  # broken unless as many threads come
        counter, rows = ctypes.c_int64.from_address(next_job), (ctypes.c_int64 * jobs_count).from_address(jobs)
        while True:
            with lock:
                at, counter.value = counter.value, counter.value + 1
            if at >= jobs_count:
                return
            with lock:
                seen.append((level, wide, rows[at]))

    address = ctypes.cast(entry, ctypes.c_void_p).value
    with threads(count):
        native_calls.run_jobs(
            address, native_calls.table([[i] for i in range(100)]), 100, 10, native_calls.THREADED_WORK, wide=False
        )
    assert sorted(seen) == [(native_calls.level(), 0, i) for i in range(100)]
    starts = sorted(scratches.values())
    assert len(starts) == count
    assert all(b - a >= 8 * 10 for a, b in itertools.pairwise(starts))


@built
def test_signals_reach_the_program_after_threads_were_started():
    caught, before = [], signal.signal(signal.SIGUSR1, lambda *_: caught.append(threading.current_thread()))
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with threads(2):
            factor_gram(*draw([8] * 4, [(20_000, 20_000)], torch.float32), backend="native")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caught == [threading.main_thread()]


@built
def test_what_can_be_mixed_number_by_number():
    b, a = torch.randn(6, 4), torch.randn(4, 6)
    tall = {
        True: [[b, b.clone()], [b[:1], b[1:2]], [b[:, :1].contiguous()]],
        False: [[b, b[:, :2]], [b, b.double()], [b.T.contiguous().T], [b[::2]]],
    }
    for mixable, modules in tall.items():
        assert Stacks(modules, transposed=False).mixable == [mixable] * len(modules)
    assert Stacks([[a, a.clone()], [a[:1]]], transposed=True).mixable == [True, True]
    assert Stacks([[a, a[:2]], [a.T.contiguous().T], [a[:, :5]]], transposed=True).mixable == [False] * 3


@built
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 says what this test is about
def test_threads_survive_a_fork():
    G = gradients(9, [(700_001,)])
    fork = multiprocessing.get_context("fork")
    with threads(2):
        want = grad_gram(G).n0
        with fork.Pool(1) as pool:
            assert pool.apply(_norm, (G,)) == float(want)


def _norm(G):
    torch.set_num_threads(2)
    return float(grad_gram(G).n0)


@built
def test_an_extension_of_other_sources_is_not_called(monkeypatch):
    ours = native_calls.LOOPS
    other = native_calls.Extension(ours.module, ours.calls, ours.counts, abi=-1)
    monkeypatch.setattr(native_calls, "LOOPS", other)
    assert "expected -1: install fedgram again" in native_calls.missing()
    assert resolve("auto", [torch.ones(2)], native=True) == "torch"
