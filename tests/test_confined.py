"""Programs that try to get out of where generated code runs. Each is contained, and scored wrong."""
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ascend_nb.confined import MACHINES, landlock_abi, run_confined, seccomp_filter, walls
from ascend_nb.core import UserError
from ascend_nb.evaluator import _written
from ascend_nb.tasks import Item, get_task, load_task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")


def test_canonical_solutions_pass_and_broken_ones_do_not(shared_data):
    rows = [json.loads(x) for x in (shared_data / "eval/human_eval/human-eval.jsonl").read_text().splitlines()][:12]
    for name in ("lm-eval", "modellink"):
        task = get_task("human_eval", name)
        items = {i.doc["task_id"]: i for i in load_task(task, shared_data / "eval", limit=12)}
        for r in rows:
            assert _written(items[r["task_id"]], r["canonical_solution"], task)["correct"], r["task_id"]
        broken = _written(items[rows[0]["task_id"]], "    return None\n", task)
        assert not broken["correct"] and broken["verdict"] == "AssertionError"


@pytest.mark.slow
def test_all_canonical_solutions_pass(shared_data):
    task = get_task("human_eval", "lm-eval")
    for i in load_task(task, shared_data / "eval"): assert _written(i, i.doc["canonical_solution"], task)["correct"], i.doc["task_id"]


def contained(program, timeout=3.0, **more):
    v = run_confined(program, timeout=timeout, **more)
    assert not v.passed and v.seconds < timeout + 8, v
    return v.why


@pytest.mark.parametrize("program", ["open({0!r}, 'w').write('x')", "import os; os.unlink({1!r})", "import os; os.rename({1!r}, 'mine')", "import os; os.truncate({1!r}, 0)", "import os; os.mkdir({0!r})",
                                     "import os; os.link({1!r}, 'l')", "import os; os.chmod({1!r}, 0)", "import os; os.chown({1!r}, 1, 1)", "import os; os.utime({1!r})", "import os; os.setxattr({1!r}, 'user.x', b'1')",
                                     "import ctypes; c = ctypes.CDLL(None, use_errno=True); assert c.chmod({1!r}.encode(), 0) == 0", "import os; os.symlink('/', 's'); open('s/tmp/confined_link', 'w')",
                                     "import os; os.chdir(os.path.dirname({1!r})); open('there', 'w')", "open({1!r}).read()", "import os; assert os.listdir(os.path.dirname({1!r}))"])
def test_nothing_outside_changes_or_is_read(program, tmp_path):
    if landlock_abi() == 0 and ("read()" in program or "listdir" in program): pytest.skip("without Landlock files may be read")
    (tmp_path / "old").write_text("secret"); os.chmod(tmp_path / "old", 0o644)
    before = (tmp_path / "old").stat()
    contained(program.format(str(tmp_path / "new"), str(tmp_path / "old")))
    after = (tmp_path / "old").stat()
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "secret"
    assert (before.st_mode, before.st_uid, before.st_mtime_ns, before.st_size, before.st_nlink) == (after.st_mode, after.st_uid, after.st_mtime_ns, after.st_size, after.st_nlink)
    assert not Path("/tmp/confined_link").exists()


def children():
    return {p.name for p in Path("/proc").glob("[0-9]*") if p.is_dir() and f"PPid:\t{os.getpid()}\n" in (p / "status").read_text()}


@pytest.mark.parametrize("program", ["import os\nwhile True: os.fork()", "import subprocess; subprocess.run(['/bin/true'], check=True)", "import os; assert os.system('true') == 0", "import multiprocessing as m; p = m.Process(target=print); p.start()",
                                     "import os; os.execv('/bin/true', ['true'])", "import os; os.posix_spawn('/bin/true', ['true'], {})", "import os; os.setsid()", "import os; os.kill(os.getppid(), 9)", "import os; os.killpg(0, 9)",
                                     "import ctypes; assert ctypes.CDLL(None).vfork() >= 0", "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0", "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
                                     "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))"])
def test_no_other_process_is_made_or_reached(program):
    before = children()
    contained(program)
    assert children() <= before


def test_no_socket_reaches_a_listener_that_is_there():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        reached = []
        threading.Thread(target=lambda: reached.append(s.accept()), daemon=True).start()
        port = s.getsockname()[1]
        for program in (f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))", "import socket; socket.socketpair()",
                        f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}', timeout=1)"): assert "PermissionError" in contained(program) or "urlopen" in contained(program)
        with socket.create_connection(("127.0.0.1", port)): time.sleep(0.1)
        assert len(reached) == 1, "the listener works, and only we reached it"


def test_no_secret_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run_confined("import os; assert 'hf_secret' not in str(dict(os.environ))").passed
    if landlock_abi(): contained(f"assert b'x' in open('/proc/{os.getpid()}/environ', 'rb').read() + b'x'")
    contained("assert b'hf_secret' in open('/proc/self/environ', 'rb').read()")


def test_time_memory_and_disk_end():
    assert contained("import time; time.sleep(99)", timeout=1.0) == "timeout"
    assert contained("while True: pass", timeout=1.0) == "timeout"
    assert contained("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)", timeout=1.0) == "timeout"
    assert contained("x = bytearray(3 << 30)") == "MemoryError"
    contained("x = []\nwhile True: x.append(bytes(1 << 20))", memory=256 << 20)
    contained("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()", timeout=2.0)
    contained("open('big', 'wb').write(bytes(1 << 22))")
    assert contained("i = 0\nwhile True:\n    i += 1; open(str(i), 'wb').write(bytes(1 << 20))", timeout=20.0) in ("folder full", "PermissionError: [Errno 1] Operation not permitted")
    assert not list(Path("/tmp").glob("confined-*/big"))


@pytest.mark.parametrize("program", ["exit(0)", "import sys; sys.exit()", "import os; os._exit(0)", "raise SystemExit", "import signal, os; signal.raise_signal(9)", "def f(): f()\nimport sys; sys.setrecursionlimit(10**9); f()",
                                     "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)", "import builtins; builtins.exit = None; 1/0", "x = ", "assert False", "\x00"])
def test_only_the_end_of_the_program_passes(program): contained(program)


def test_its_own_folder_is_writable_and_gone_afterwards():
    v = run_confined("import os; open('a', 'w').write('x'); os.mkdir('d'); print(os.getcwd()); assert os.listdir('.')")
    assert v.passed == (landlock_abi() > 0)
    assert run_confined("import threading; t = threading.Thread(target=lambda: None); t.start(); t.join()").passed
    assert run_confined("import math, itertools, collections, functools, heapq, re, json, random, datetime, typing, hashlib").passed
    assert walls()["network"] == "seccomp"


def test_without_landlock_nothing_can_be_written(tmp_path):
    "The fallback, as a kernel without Landlock would need it."
    (tmp_path / "old").write_text("x")
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from ascend_nb import confined; confined.landlock_abi = lambda: 0; confined._walls('.')\n"
            "import os\nassert open(sys.argv[2]).read() == 'x'\n"
            "for t in (lambda: open(sys.argv[2], 'a'), lambda: open(sys.argv[2] + '2', 'x'), lambda: os.unlink(sys.argv[2]), lambda: os.mkdir(sys.argv[2] + 'd'), lambda: os.truncate(sys.argv[2], 0)):\n"
            "    try: t()\n    except OSError: continue\n    raise SystemExit('written')\nprint('kept')")
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent.parent), str(tmp_path / "old")], capture_output=True, text=True)
    assert done.stdout.strip() == "kept", done.stderr
    assert (tmp_path / "old").read_text() == "x"


def test_a_machine_without_walls_runs_nothing(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match="no way to confine .* riscv64"): run_confined("pass")
    assert all(len(seccomp_filter(m, True)) % 8 == 0 for m in MACHINES)


def test_system_calls_have_the_numbers_of_this_machines_headers():
    "The tables against the kernel's own headers, where the compiler's package brought them."
    from ascend_nb.confined import CHANGES, REFUSED
    col = 1 + MACHINES[os.uname().machine][0]
    files = [p for p in ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h") if Path(p).is_file()]
    if not files: pytest.skip("no headers of the kernel here")
    for file in files:
        at = 1 if "x86_64" in file else 2
        known = {}
        for line in Path(file).read_text().splitlines():
            w = line.split()
            if len(w) == 3 and w[0] == "#define" and w[1].startswith(("__NR_", "__NR3264_")) and w[2].isdigit(): known[w[1].partition("_")[2].lstrip("_").partition("_")[2]] = int(w[2])
        for row in ", ".join([*REFUSED.values(), CHANGES]).split(", "):
            w = row.split()
            if w[0] in known: assert int(w[at]) == known[w[0]], (file, row)
            assert col
        assert len(known) > 200


def test_an_item_of_humaneval_has_its_program():
    item = Item("", 0, dict(prompt="def add(a, b):\n", test="def check(f):\n    assert f(1, 2) == 3\n", entry_point="add"), "p", (), "add")
    for name, said in (("lm-eval", "    return a + b"), ("modellink", "    return a + b\n\nprint(add(1, 2))\n")):
        task = get_task("human_eval", name)
        assert _written(item, said, task)["correct"] and not _written(item, said.replace("+", "-"), task)["correct"]
