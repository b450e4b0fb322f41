"""`ascend_nb train` in which something goes wrong once: FAULT=kind:rank:step:event, MARK a file that is there when it has happened."""
import os
import signal
import sys
import time
from pathlib import Path

from ascend_nb import training
from ascend_nb.checkpoint import RunDir
from ascend_nb.cli import main
from ascend_nb.trainer import Callback

KIND, RANK, STEP, EVENT = os.environ.get("FAULT", "none:0:0:before_step").split(":")


def cut(t):
    "The largest file of the step that was just saved loses its second half, and the process dies."
    path = max(RunDir(t.cfg.save).step_path(t.step).iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def broken(t): raise ValueError("an error made on purpose")


DO = dict(kill=lambda t: os.kill(os.getpid(), signal.SIGKILL), term=lambda t: os.kill(os.getpid(), signal.SIGTERM), hang=lambda t: time.sleep(3600), error=broken, cut=cut, none=None)


class Fault(Callback):
    order = 95 if EVENT == "after_step" else 7
    def strike(self, t, step):
        mark = Path(os.environ.get("MARK", "/nowhere"))
        if KIND == "none" or int(os.environ.get("RANK", 0)) != int(RANK) or step != int(STEP) or mark.exists(): return
        mark.touch()
        DO[KIND](t)


setattr(Fault, EVENT, lambda self, t: self.strike(t, t.step + (EVENT != "after_step")))


class Samples(Callback):
    "The numbers of the samples that each step took, by all processes together: SAMPLES names a file."
    def after_step(self, t):
        with open(os.environ["SAMPLES"], "a") as f: f.write(f"{t.step} {t.consumed}\n")


if __name__ == "__main__":
    real = training.lifelines
    training.lifelines = lambda *a: [*real(*a), Fault()]
    sys.exit(main(sys.argv[1:]))
