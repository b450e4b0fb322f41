"""Write empty CANN libraries so that the real torch_npu can be imported without CANN: `python stand_ins.py FOLDER`.

torch_npu links against six libraries of CANN and wants every symbol at load time. `pretend_card.c` says what the few functions do that allocate and copy
(memory of the host); whatever would compute refuses, so nothing can pretend to have a result; all other functions are empty and made here, by name.
"""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

LIBS = ("libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")
FAILS = 507899  # an error code of the runtime
WORKS = re.compile("Execute|Launch|CompileAnd|Memcpy|Memset|Malloc")  # functions that would do something
CARD = Path(__file__).with_name("pretend_card.c")


def package(name): return Path(importlib.util.find_spec(name).origin).parent


def symbols(files, *flags):
    "Names in the dynamic symbol tables of some libraries."
    out = set()
    for f in files:
        text = subprocess.run(["nm", "-D", *flags, str(f)], capture_output=True, text=True).stdout
        out |= {line.split()[-1].split("@")[0] for line in text.splitlines() if line.split()}
    return out


def linked(binary):
    "The libraries that a binary loads."
    text = subprocess.run(["ldd", str(binary)], capture_output=True, text=True).stdout
    return [w for line in text.splitlines() for w in line.split() if w.startswith("/")]


def missing():
    "What torch_npu wants and nobody on this machine gives."
    npu, torch = package("torch_npu"), package("torch")
    want = [*npu.glob("_C*.so"), *(npu / "lib" / f"{n}.so" for n in ("libtorch_npu", "libtensorpipe", "libnpu_profiler"))]
    have = [*npu.glob("lib/*.so"), *torch.glob("lib/*.so"), os.path.realpath(sys.executable)]
    have += [x for f in (want[0], os.path.realpath(sys.executable), npu / "lib/libnpu_profiler.so") for x in linked(f)]
    needed = symbols([w for w in want if w.exists()], "--undefined-only") - symbols(have, "--defined-only")
    return sorted(s for s in needed if s.isidentifier() and not s.startswith(("_Z", "__", "_ITM")))


def build(folder):
    "One library with every function, and the other names linked to it."
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    names = missing()
    src = folder / "stand_ins.c"
    card = CARD.read_text(encoding="utf-8")
    mine = set(re.findall(r"\b(\w+)\(", card)) | set(re.findall(r"\b(?:YES|NO)\((\w+)\)", card))
    src.write_text(card + "".join(f"long {n}() {{ return {FAILS if WORKS.search(n) else 0}; }}\n" for n in names if n not in mine))
    for lib in LIBS:
        extra = [str(src)] if lib == LIBS[0] else ["-Wl,--no-as-needed", f"-L{folder}", "-lascendcl"]
        subprocess.run(["gcc", "-w", "-fPIC", "-shared", "-o", str(folder / f"{lib}.so"), f"-Wl,-soname,{lib}.so", *extra], check=True)
    print(f"{len(names)} functions stand in for CANN in {folder}", file=sys.stderr)


if __name__ == "__main__": build(sys.argv[1])
