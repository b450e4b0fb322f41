"""The command line in this process: what a program of its own prints, without the seconds that one needs to start."""
import io
import os
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

from ascend_nb.cli import main


def ascend(*args, stdin="", cwd=".", env=None):
    "`ascend_nb ARGS`: its exit code, and what it wrote."
    out, err, back = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with patch.dict(os.environ, env or {}), patch("sys.stdin", io.StringIO(stdin)), redirect_stdout(out), redirect_stderr(err): code = main([str(a) for a in args])
    finally: os.chdir(back)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
