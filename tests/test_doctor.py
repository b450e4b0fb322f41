"""`ascend_nb doctor` on machines that are broken in real ways: child processes, real files, a real torch_npu without CANN."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_nb.doctor import CANN_OF, Facts, cann_key, checks, gather, parse_smi, probe, report

ROOT = Path(__file__).resolve().parent.parent
RUN = "import sys; from ascend_nb.cli import main; sys.exit(main())"
SMI = """
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc3                 Version: 24.1.rc3                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 178.8       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3421 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          3193/ 65536          |
+===========================+===============+====================================================+
| 0       0                 | 3018203       | python3.11               | 54321                   |
+===========================+===============+====================================================+
"""
SMI_310P = """
| NPU     Name                  | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device                | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
| 0       310P3                 | OK              | NA           59                0     / 0             |
| 0       0                     | 0000:01:00.0    | 0            1310 / 43693                            |
"""
WORKING = dict(torch="2.9.0+cpu", torch_npu="2.9.0", imported=True, cuda=[], npus=["Ascend910B3"] * 2, sum=4.0)


def doctor(*args, python=sys.executable, **env):
    "The command in a process of its own."
    env = {k: v for k, v in {**os.environ, "ASCEND_NB_LANG": "en", "ASCEND_RT_VISIBLE_DEVICES": None, "ASCEND_HOME_PATH": None, **env}.items() if v is not None}
    return subprocess.run([python, "-c", RUN, "doctor", *args], capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)


def facts(tmp_path, **kw):
    "Facts of a machine of our making."
    base = dict(env={}, root=tmp_path, probe=WORKING, davinci=[0, 1], cards=parse_smi(SMI), cann_home="", cann="", set_env="", device="auto", here=".")
    return Facts(**{**base, **kw})


def by_name(found): return {c.name: c for c in found}


def npu_host(root, cards=2, version="8.5.0"):
    "Files of an NPU host below `root`; returns its environment after `source set_env.sh`, with an npu-smi in the PATH."
    (root / "dev").mkdir()
    for i in range(cards): (root / "dev" / f"davinci{i}").touch()
    (root / "dev/davinci_manager").touch()
    home = root / "usr/local/Ascend/ascend-toolkit/latest"
    (home / "x86_64-linux").mkdir(parents=True)
    (home.parent / "set_env.sh").touch()
    (home / "x86_64-linux/ascend_toolkit_install.info").write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100\n")
    smi = root / "bin/npu-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\ncat <<'EOF'\n{SMI}EOF\n")
    smi.chmod(0o755)
    return {**os.environ, "PATH": f"{smi.parent}{os.pathsep}{os.environ['PATH']}", "ASCEND_HOME_PATH": str(home), "LD_LIBRARY_PATH": f"{home}/lib64"}


# ---- this machine


def test_a_cpu_machine_is_healthy_and_says_so():
    r = doctor()
    if Path("/dev/davinci0").exists(): pytest.skip("this machine has an NPU")
    assert (r.returncode, r.stderr) == (0, ""), r.stdout + r.stderr
    assert "this is a CPU machine" in r.stdout and "runs ascend_nb on cpu" in r.stdout


def test_json_and_an_npu_that_is_asked_for():
    r = doctor("--json", "--device", "npu")
    if Path("/dev/davinci0").exists(): pytest.skip("this machine has an NPU")
    out = json.loads(r.stdout)
    assert r.returncode == 2 and out["exit_code"] == 2 and out["ok"] is False and out["device"] in ("cpu", "cuda")
    assert all(bool(c["fix"]) == (not c["ok"]) and c["found"] for c in out["checks"])
    assert not by_name_json(out)["cards"]["ok"]


def by_name_json(out): return {c["name"]: c for c in out["checks"]}


def test_chinese():
    assert "所有功能都可在其上运行" in doctor(ASCEND_NB_LANG="zh").stdout


# ---- broken installations, each in a real child process


def broken_torch(folder, body, **versions):
    "Put a torch package of our making before the real one, with metadata for it and whatever else."
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").write_text(body)
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return dict(PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")


@pytest.mark.parametrize("body,word", [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process ended with code -11"),
    ("raise ImportError('libgomp.so.1: cannot open shared object file')", "ImportError: libgomp.so.1"),
    ("import sys; sys.exit(3)", "SystemExit: 3")])
def test_a_torch_that_cannot_be_imported(tmp_path, body, word):
    r = doctor(**broken_torch(tmp_path, body, torch="2.13.0"))
    assert r.returncode == 2 and "Traceback" not in r.stderr, r.stderr
    assert word in r.stdout and "pip install --force-reinstall torch==2.13.0" in r.stdout


def test_a_torch_that_hangs_is_given_up(tmp_path):
    env = {**os.environ, **broken_torch(tmp_path, "import time; time.sleep(60)", torch="2.13.0")}
    assert "TimeoutExpired" in probe(env, timeout_s=1)["error"]


def test_no_torch_at_all(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    c = by_name(checks(gather(env=env, root=tmp_path, python=str(tmp_path / "empty/bin/python"))))
    assert (c["torch"].ok, c["torch"].fix, c["torch_npu"].ok) == (False, "pip install torch==2.13.0", True)


def test_torch_npu_of_another_minor(tmp_path):
    env = broken_torch(tmp_path, "raise RuntimeError('Failed to load the backend extension: torch_npu')", torch="2.13.0", torch_npu="2.7.1")
    r = doctor(**env)
    assert r.returncode == 2
    assert 'pip install "torch_npu==2.13.*"' in r.stdout and "made for torch 2.7, and torch is 2.13.0" in r.stdout


@pytest.mark.net
@pytest.mark.slow
def test_the_real_torch_npu_without_cann(tmp_path):
    "The trap: its wheel beside torch, and `import torch` fails."
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", "torch_npu==2.13.0"], check=True, capture_output=True)
    env = dict(PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    plain = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True, env={**os.environ, **env})
    assert plain.returncode == 1 and "TORCH_DEVICE_BACKEND_AUTOLOAD" in plain.stderr
    r = doctor(**env)
    assert r.returncode == 2 and "Traceback" not in r.stderr, r.stderr
    assert "ImportError: libhccl.so" in r.stdout and "pip uninstall -y torch_npu" in r.stdout and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in r.stdout
    assert r.stdout.count("mend it with") == 1, "one cause, one command"
    r = doctor(**env, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "ok       torch      2.13" in r.stdout and "PROBLEM  torch_npu  2.13.0 cannot be loaded" in r.stdout


# ---- NPU hosts, from files


def test_a_host_whose_shell_does_not_know_cann(tmp_path):
    env = npu_host(tmp_path)
    del env["ASCEND_HOME_PATH"]
    f = gather(env=env, root=tmp_path)
    assert f.davinci == [0, 1] and [c.used_mb for c in f.cards] == [3421, 3193]
    c = by_name(checks(f))
    assert c["cann"].fix == f"source {tmp_path}/usr/local/Ascend/ascend-toolkit/set_env.sh"
    assert c["cards"].ok and c["visible"].ok and c["driver"].ok
    assert "3421/65536 MB, python3.11 (pid 3018203) 54321 MB" in c["driver"].found
    assert c["torch_npu"].ok or "torch_npu==" in c["torch_npu"].fix


def test_a_healthy_host(tmp_path):
    f = gather(env=npu_host(tmp_path), root=tmp_path)
    f.probe = WORKING
    found = checks(f)
    assert [c.name for c in found if not c.ok] == []
    assert found[-1].name == "npu" and "8.5.0 at" in by_name(found)["cann"].found
    assert "2 visible" in found[-1].found


@pytest.mark.parametrize("value,mend", [("1,0", "0,1"), ("0,0", "0"), ("0,7", "0"), ("", "0"), ("0;1", "0,1"), ("all", "0")])
def test_visible_devices(tmp_path, value, mend):
    c = by_name(checks(facts(tmp_path, env={"ASCEND_RT_VISIBLE_DEVICES": value})))["visible"]
    assert not c.ok and c.fix == f"export ASCEND_RT_VISIBLE_DEVICES={mend}"


@pytest.mark.parametrize("npu,cann,ok", [("2.8.0", "8.2.RC1", False), ("2.8.0", "8.3.RC1", True), ("2.8.0", "8.5.0", True), ("2.9.0", "8.3.RC2", False), ("2.13.0", "9.0.0", True)])
def test_cann_may_be_newer_than_torch_npu_and_not_older(tmp_path, npu, cann, ok):
    p = {**WORKING, "torch": npu, "torch_npu": npu}
    assert by_name(checks(facts(tmp_path, probe=p, cann_home=str(tmp_path), cann=cann)))["cann"].ok is ok


def test_cann_releases_are_in_order():
    order = ["7.0.0", "8.0.RC1", "8.0.RC3", "8.0.0.beta1", "8.0.0", "8.1.RC1", "8.2.RC1", "8.3.RC1", "8.5.0", "9.0.0", "10.0.0"]
    assert sorted(reversed(order), key=cann_key) == order
    assert all(minor_of(k) >= (2, 1) for k in CANN_OF)


def minor_of(v): return tuple(map(int, v.split(".")[:2]))


@pytest.mark.parametrize("error,word", [
    ("ImportError: libascend_hal.so: cannot open shared object file", "npu-driver"),
    ("ImportError: libtorch_npu.so: undefined symbol: _ZN3c10", "--force-reinstall"),
    ("ImportError: libhccl.so: cannot open shared object file", "Ascend-cann-toolkit")])
def test_what_the_loader_misses_names_the_floor(tmp_path, error, word):
    p = dict(torch="2.9.0", torch_npu="2.9.0", error=error)
    c = by_name(checks(facts(tmp_path, probe=p)))
    assert word in c["torch_npu"].fix and word in c["torch"].fix


def test_a_card_that_is_ill_or_shut(tmp_path):
    ill = parse_smi(SMI.replace("| OK            | 178.8", "| Critical      | 178.8"))
    assert by_name(checks(facts(tmp_path, cards=ill)))["driver"].fix == "npu-smi info -t health -i 0"
    assert "usermod" in by_name(checks(facts(tmp_path)))["cards"].fix  # the device files of `facts` do not exist, so they cannot be opened


def test_the_npu_is_tried_only_when_all_else_is_well(tmp_path):
    f = gather(env=npu_host(tmp_path), root=tmp_path)
    f.probe = {k: v for k, v in WORKING.items() if k != "sum"} | {"error": "RuntimeError: error code is 507899"}
    last = checks(f)[-1]
    assert last.name == "npu" and "507899" in last.found and "ASCEND_LAUNCH_BLOCKING=1" in last.fix
    assert report([last], "npu").count("mend it with") == 1


def test_smi_of_other_generations():
    assert [(c.name, c.used_mb, c.total_mb) for c in parse_smi(SMI_310P)] == [("310P3", 1310, 43693)]
    assert parse_smi("") == parse_smi("dcmi model initialized failed, because the device is used. ret is -8020") == []


def test_a_driver_that_tells_process_numbers_of_containers_too():
    text = """| 0     910B3               | OK            | 98.1        45                0    / 0             |
| 0                         | 0000:C1:00.0  | 12          0    / 0          31877/ 65536         |
| NPU     Chip              | Process id    | Process name       | Process memory(MB)    | Process id in container |
| 0       0                 | 632268        | python3.1          | 197                   | NA                      |
"""
    assert parse_smi(text)[0].processes == [[632268, "python3.1", 197]]
