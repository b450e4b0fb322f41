"""Programs that try to get out of where generated code runs. Each is contained, and scored wrong."""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from ascend_nb import confined
from ascend_nb.confined import MACHINES, landlock_abi, run_confined, seccomp_filter, walls
from ascend_nb.core import UserError
from ascend_nb.evaluator import _written
from ascend_nb.tasks import Item, get_task, load_task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")


def test_canonical_solutions_pass_and_broken_ones_do_not(shared_data):
    rows = [json.loads(x) for x in (shared_data / "eval/human_eval/human-eval.jsonl").read_text().splitlines()][:4]
    for name in ("lm-eval", "modellink"):
        task = get_task("human_eval", name)
        items = {i.doc["task_id"]: i for i in load_task(task, shared_data / "eval", limit=4)}
        for r in rows:
            assert _written(items[r["task_id"]], r["canonical_solution"], task)["correct"], r["task_id"]
        broken = _written(items[rows[0]["task_id"]], "    return None\n", task)
        assert not broken["correct"] and broken["verdict"] == "AssertionError"


@pytest.mark.slow
def test_all_canonical_solutions_pass(shared_data):
    task = get_task("human_eval", "lm-eval")
    for i in load_task(task, shared_data / "eval"): assert _written(i, i.doc["canonical_solution"], task)["correct"], i.doc["task_id"]


ALONE = {"guard and walls": "", "walls alone": "c.TRIES, c.PLACES = ('-',), (); ", "walls without Landlock": "c.TRIES, c.PLACES = ('-',), (); c.landlock_abi = lambda: 0; "}


@pytest.fixture(params=[pytest.param(k, marks=[pytest.mark.slow] * (k != "walls alone")) for k in ALONE])
def room(request, monkeypatch):
    "Each wall holds by itself: with the guard, without it, and as a kernel without Landlock would have it."
    if request.param != "walls without Landlock" and landlock_abi() == 0: pytest.skip("no Landlock here")
    monkeypatch.setattr(confined, "_CHILD", f"import sys; sys.path.insert(0, sys.argv[1]); from ascend_nb import confined as c; {ALONE[request.param]}c._inside()")
    return request.param


def contained(program, timeout=3.0, **more):
    v = run_confined(program, timeout=timeout, **more)
    assert not v.passed and v.seconds < timeout + 8, v
    return v.why


def some(programs, every=4): # each costs a process: the others are slow
    return [pytest.param(p, marks=[pytest.mark.slow] * (i % every > 0)) for i, p in enumerate(programs)]


FILES = ["open({0!r}, 'w').write('x')", "import os; os.unlink({1!r})", "import os; os.rename({1!r}, 'mine')", "import os; os.truncate({1!r}, 0)", "import os; os.mkdir({0!r})",
         "import os; os.link({1!r}, 'l'); open('l').read()", "import os; os.chmod({1!r}, 0)", "import os; os.chown({1!r}, 1, 1)", "import os; os.utime({1!r})", "import os; os.setxattr({1!r}, 'user.x', b'1')",
         "import ctypes; c = ctypes.CDLL(None, use_errno=True); assert c.chmod({1!r}.encode(), 0) == 0", "import os; os.symlink('/', 's'); open('s/tmp/confined_link', 'w')",
         "import os; os.symlink({1!r}, 's'); open('s').read()", "import os; os.chdir(os.path.dirname({1!r})); open('there', 'w')", "open({1!r}).read()", "import os; assert os.listdir(os.path.dirname({1!r}))",
         "import os; os.open({1!r}, os.O_RDONLY)", "import io; io.FileIO({1!r})", "import pathlib; pathlib.Path({1!r}).read_bytes()", "open({1!r}.encode(), 'rb').read()", "open('../' * 9 + {1!r}, 'rb').read()",
         "open('/dev/shm/confined_test', 'w')", "open('/tmp/confined_test', 'w')", "import os; open(os.path.expanduser('~' * (os.sep == '/') + 'root/.profile')).read()", "open('/proc/self/mem', 'r+b')", "open('/etc/passwd').read()",
         "import ctypes; c = ctypes.CDLL(None); assert c.open({1!r}.encode(), 0) >= 0", "import ctypes; c = ctypes.CDLL(None); assert c.syscall(257, -100, {1!r}.encode(), 0, 0) >= 0", "import sqlite3; sqlite3.connect({0!r}).execute('create table t (x)')"]


@pytest.mark.parametrize("program", some(FILES))
def test_nothing_outside_changes_or_is_read(program, tmp_path, room):
    (tmp_path / "old").write_text("secret"); os.chmod(tmp_path / "old", 0o644)
    before = (tmp_path / "old").stat()
    contained(program.format(str(tmp_path / "new"), str(tmp_path / "old")))
    after = (tmp_path / "old").stat()
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "secret"
    assert (before.st_mode, before.st_uid, before.st_mtime_ns, before.st_size, before.st_nlink) == (after.st_mode, after.st_uid, after.st_mtime_ns, after.st_size, after.st_nlink)
    assert not any(Path(p).exists() for p in ("/tmp/confined_link", "/tmp/confined_test", "/dev/shm/confined_test"))


TRIED = {"import socket\ntry: socket.socket()": "tried: socket.__new__", "import os\ntry: os.fork()": "tried: os.fork", "try: open('/etc/passwd')": "tried: open ('/etc/passwd',)", "try: open('/tmp/x', 'w')": "tried: open ('/tmp/x',)",
         "import subprocess\ntry: subprocess.run(['ls'])": "tried: subprocess.Popen", "import os\ntry: os.kill(os.getppid(), 9)": "tried: os.kill", "import os\ntry: os.remove('/etc/passwd')": "tried: os.remove ('/etc/passwd',)",
         "import ctypes\ntry: ctypes.CDLL(None)": "tried: ctypes.dlopen", "import gc\ntry: gc.get_objects()": "tried: gc.get_objects"}


@pytest.mark.parametrize("program", some(TRIED, 3))
def test_who_only_tried_is_wrong_too(program):
    "The error is caught, and the program would have gone on to its right end."
    assert contained(program + "\nexcept BaseException: pass") == TRIED[program]


def test_the_kernel_ends_who_passes_the_guard_by(monkeypatch):
    monkeypatch.setattr(confined, "_CHILD", f"import sys; sys.path.insert(0, sys.argv[1]); from ascend_nb import confined as c; {ALONE['walls alone']}c._inside()")
    for program in ("import socket\ntry: socket.socket()", "import os\ntry: os.fork()", "import os\ntry: os.kill(os.getppid(), 0)", "import ctypes\ntry: ctypes.CDLL(None).ptrace(16, 1, 0, 0)"):
        assert contained(program + "\nexcept BaseException: pass") == "tried a refused system call"


def children():
    out = set()
    for p in Path("/proc").glob("[0-9]*/status"):
        try: out |= {p.parent.name} if f"PPid:\t{os.getpid()}\n" in p.read_text() else set()
        except OSError: pass # it is gone
    return out


@pytest.mark.parametrize("program", some(["import os\nwhile True: os.fork()", "import subprocess; subprocess.run(['/bin/true'], check=True)", "import os; assert os.system('true') == 0", "import multiprocessing as m; p = m.Process(target=print); p.start()",
                                     "import os; os.execv('/bin/true', ['true'])", "import os; os.posix_spawn('/bin/true', ['true'], {})", "import os; os.setsid()", "import os; os.kill(os.getppid(), 9)", "import os; os.killpg(0, 9)",
                                     "import ctypes; assert ctypes.CDLL(None).vfork() >= 0", "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
                                     "import ctypes; c = ctypes.CDLL(None); assert c.syscall(56, 17, 0, 0, 0, 0) >= 0", "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
                                     "import resource; resource.prlimit({0}, resource.RLIMIT_NOFILE, (9, 9))", "import os; os.kill({0}, 9)", "import os; os.kill(-1, 9)", "import os, signal; os.kill({0}, signal.SIGSTOP)"]))
def test_no_other_process_is_made_or_reached(program, room):
    before = children()
    contained(program.replace("{0}", str(os.getpid())))
    assert children() <= before


@pytest.mark.parametrize("program", some(["import os; os.setpriority(os.PRIO_PROCESS, {0}, 1)", "import os; os.sched_setaffinity({0}, [0])", "import os; os.sched_setscheduler({0}, os.SCHED_BATCH, os.sched_param(0))",
                                     "import ctypes; assert ctypes.CDLL(None).syscall(251, 1, {0}, 3 << 13) == 0", "import ctypes; assert ctypes.CDLL(None).syscall(300, 4, 0) >= 0", "import ctypes; assert ctypes.CDLL(None).syscall(294, 0) >= 0",
                                     "import ctypes; assert ctypes.CDLL(None).syscall(103, 10, 0, 0) >= 0", "import os; os.setuid(65534)", "import fcntl; fcntl.flock(open('/usr/bin/env'), fcntl.LOCK_EX)",
                                     "import ctypes; assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0", "import fcntl, array; fcntl.ioctl(open('a', 'w'), 0x40086602, array.array('l', [0x10]))"]))
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="some numbers of calls are those of x86_64")
def test_the_parent_is_neither_slowed_nor_watched(program, room):
    def state(): return os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), os.sched_getscheduler(0)
    before = state()
    contained(program.replace("{0}", str(os.getpid())))
    assert state() == before


def test_a_pipe_sends_the_parent_no_signal(room):
    "fcntl(F_SETOWN) makes the kernel send a signal when a pipe has data: a kill without kill."
    got = []
    old = signal.signal(signal.SIGUSR1, lambda *a: got.append(a))
    try:
        contained(f"import os, fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {os.getpid()})\nfcntl.fcntl(r, 10, {int(signal.SIGUSR1)})\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')\nassert False")
        time.sleep(0.1)
        assert not got
    finally: signal.signal(signal.SIGUSR1, old)


def test_nobody_outlives_the_one_who_marks(tmp_path):
    "The process that marks is killed: the program, which only sleeps, is gone too."
    code = "import sys; from ascend_nb.confined import run_confined; run_confined('import time; time.sleep(300)', 300)"
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    def sleepers(): return [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _bytes(p)]
    def _bytes(p):
        try: return p.read_bytes()
        except OSError: return b""
    try:
        end = time.time() + 30
        while not sleepers() and time.time() < end: time.sleep(0.05)
        assert sleepers()
        time.sleep(0.3)
    finally: child.kill(); child.wait()
    end = time.time() + 5
    while sleepers() and time.time() < end: time.sleep(0.05)
    assert not sleepers()


def test_no_socket_reaches_a_listener_that_is_there(room):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        reached = []
        threading.Thread(target=lambda: reached.append(s.accept()), daemon=True).start()
        port = s.getsockname()[1]
        for program in (f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))", "import socket; socket.socketpair()",
                        f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}', timeout=1)"): assert contained(program).startswith("tried") or "without" in room
        with socket.create_connection(("127.0.0.1", port)): time.sleep(0.1)
        assert len(reached) == 1, "the listener works, and only we reached it"


def test_no_secret_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run_confined("import os; assert 'hf_secret' not in str(dict(os.environ))").passed
    contained(f"assert b'x' in open('/proc/{os.getpid()}/environ', 'rb').read() + b'x'")
    contained("assert b'hf_secret' in open('/proc/self/environ', 'rb').read()")


def test_time_memory_and_disk_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # folders of others, who mark at the same time, are not counted
    assert contained("import time; time.sleep(99)", timeout=1.0) == "timeout"
    assert contained("while True: pass", timeout=1.0) == "timeout"
    assert contained("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.setitimer(signal.ITIMER_REAL, 0); time.sleep(99)", timeout=1.0) == "timeout"
    assert contained("x = bytearray(3 << 30)") == "MemoryError"
    contained("x = []\nwhile True: x.append(bytes(1 << 20))", memory=256 << 20)
    contained("import os\nwhile True: os.write(os.memfd_create('x'), bytes(1 << 20))")
    contained("open('big', 'wb').write(bytes(1 << 22))")
    contained("import os\nfor i in range(999): os.mkdir('d'); os.chdir('d')")
    assert contained("import threading, time\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()", timeout=9.0) == "too many threads"
    if landlock_abi():
        assert contained("i = 0\nwhile True:\n    i += 1; open(str(i), 'wb').write(bytes(1 << 20))", timeout=20.0) == "folder full"
        assert contained("i = 0\nwhile True:\n    i += 1; open(str(i), 'wb')", timeout=20.0) == "folder full"
    contained("import sys\nwhile True: sys.stderr.write('x' * 9999)")
    contained("import os\nwhile True: os.write(1, b'x' * 9999)", timeout=1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", some(["exit(0)", "import sys; sys.exit()", "import os; os._exit(0)", "raise SystemExit", "import signal, os; signal.raise_signal(9)", "def f(): f()\nimport sys; sys.setrecursionlimit(10**9); f()",
                                     "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)", "import sys, os\nf = sys._getframe()\nwhile f:\n    for v in f.f_locals.values():\n        if isinstance(v, bytes): os.write(4, v); os.write(3, v)\n    f = f.f_back\nos._exit(0)",
                                     "import sys; sys.audit('ascend_nb.end'); import os; os._exit(0)", "from ascend_nb import confined; import sys; sys.audit('ascend_nb.end'); confined._inside()", "import os; os._exit(97)", "import os; os._exit(98)", "import builtins; builtins.exit = None; 1/0", "x = ", "assert False", "\x00"]))
def test_only_the_end_of_the_program_passes(program): contained(program)


def test_what_is_allowed():
    v = run_confined("import os, tempfile; open('a', 'w').write('x'); print(os.getcwd()); assert os.listdir('.') == ['a']; tempfile.TemporaryFile().write(b'x'); os.remove('a')")
    assert v.passed == (landlock_abi() > 0), v
    assert run_confined("import threading; t = threading.Thread(target=lambda: None); t.start(); t.join()").passed
    assert run_confined("def f(n): return n and f(n - 1)\nimport sys; sys.setrecursionlimit(9000); f(5000)").passed
    assert run_confined("import collections; P = collections.namedtuple('P', 'x y'); assert P(1, 2).y == 2\ntry: import no_such_module\nexcept ImportError: pass").passed
    assert walls()["network"] == "seccomp"


@pytest.mark.parametrize("room", ["guard and walls", "walls without Landlock"], indirect=True)
def test_modules_that_programs_use(room):
    names = "math, itertools, collections, functools, heapq, re, json, random, datetime, typing, hashlib, copy, string, bisect, statistics, fractions, decimal, operator, unittest, dataclasses, enum"
    v = run_confined(f"import {names}\nassert datetime.datetime.strptime('2024-02-03', '%Y-%m-%d').day == 3 and random.randint(1, 1) == 1 and hashlib.md5(b'x').hexdigest()")
    assert v.passed, v
    if "without" not in room: assert run_confined("import numpy as np; assert np.ones(3).sum() == 3").passed


def test_a_machine_without_walls_runs_nothing(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match="no way to confine .* riscv64"): run_confined("pass")
    assert all(len(seccomp_filter(m, True)) % 8 == 0 for m in MACHINES)


def test_system_calls_have_the_numbers_of_this_machines_headers():
    "The tables against the kernel's own headers, where the compiler's package brought them."
    from ascend_nb.confined import ASKED, FILES, KILLED, REFUSED
    col = 1 + MACHINES[os.uname().machine][0]
    files = [p for p in ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h") if Path(p).is_file()]
    if not files: pytest.skip("no headers of the kernel here")
    for file in files:
        at = 1 if "x86_64" in file else 2
        known = {}
        for line in Path(file).read_text().splitlines():
            w = line.split()
            if len(w) == 3 and w[0] == "#define" and w[1].startswith(("__NR_", "__NR3264_")) and w[2].isdigit(): known[w[1].partition("_")[2].lstrip("_").partition("_")[2]] = int(w[2])
        for row in ", ".join([*KILLED.values(), *REFUSED.values(), FILES, *ASKED]).split(", "):
            w = row.split()
            if w[0] in known: assert int(w[at]) == known[w[0]], (file, row)
            assert col
        assert len(known) > 200


def test_an_item_of_humaneval_has_its_program():
    item = Item("", 0, dict(prompt="def add(a, b):\n", test="def check(f):\n    assert f(1, 2) == 3\n", entry_point="add"), "p", (), "add")
    for name, said in (("lm-eval", "    return a + b"), ("modellink", "    return a + b\n\nprint(add(1, 2))\n")):
        task = get_task("human_eval", name)
        assert _written(item, said, task)["correct"] and not _written(item, said.replace("+", "-"), task)["correct"]
