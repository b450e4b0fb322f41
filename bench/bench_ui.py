"""How long the studio keeps a reader waiting: from a click to the return of its callback, against the 100 ms after which people notice.

    python bench/bench_ui.py

Every page is opened, typed into and asked for work on the shipped samples, as tests do it, in this process. Work that takes longer goes on beside the page; what is
measured is only how long the page itself is held. Python's collector, which halts a process that has imported torch for a quarter of a second once in a while, runs before
each click: it would be paid by whoever comes last, not by the one that left the garbage. One JSON object a line: `ms` (the longest of ROUNDS), `share` of 100 ms. The last line is the worst.
"""
import gc
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

from ascend_nb.ui.studio import PAGES, studio

SAMPLES, ROUNDS = Path(__file__).resolve().parent.parent / "data_samples", int(os.environ.get("ROUNDS", "3"))


def held(fn):
    "Milliseconds until a callback returns."
    gc.collect()
    start = time.perf_counter()
    fn()
    return 1000 * (time.perf_counter() - start)


def put(widget, value): widget.value = value


def rest():
    "Wait until no page works any more."
    while any("(work)" in t.name for t in threading.enumerate()): time.sleep(.05)


def clicks(desk):
    "(what, callback) for each thing that a person does."
    data, plan, train = (desk.panels[k] for k in ("panel_data", "panel_plan", "panel_train"))
    profile, doctor = desk.panels["panel_profile"], desk.panels["panel_doctor"]
    data.path.value, profile.path.value = "instruct.json", "npu_profile"
    yield "look at data", data.look.click
    yield "open the lengths", lambda: put_index(data.more, 1)
    yield "type a learning rate", lambda: put(train.pages.form.fields["train", "lr"].control, "0.001")
    yield "open the devices of a training", lambda: put(train.pages.chosen, "tr_spread")
    yield "back to its basics", lambda: put(train.pages.chosen, "tr_basics")
    yield "look for runs", train.look.click
    yield "ask for a plan", lambda: put(plan.model, "qwen2-7b")
    yield "read a recording", profile.read.click
    yield "check the machine", doctor.go.click
    tongue = desk.children[0].children[1]
    yield "all to Chinese", lambda: put(tongue, "zh")
    tongue.thread.join()
    yield "all to English", lambda: put(tongue, "en")
    tongue.thread.join()


def put_index(box, i): box.selected_index = None; box.selected_index = i


def main():
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("instruct.json", "npu_profile"): (shutil.copytree if (SAMPLES / name).is_dir() else shutil.copy)(SAMPLES / name, Path(folder, name))
        os.chdir(folder)
        worst = {}
        for _ in range(ROUNDS):
            desk = studio("panel_doctor")
            for i, key in enumerate(PAGES):
                ms = held(lambda i=i, tab=desk.tab: put_index(tab, i))
                worst[f"open {key[6:]}"] = max(ms, worst.get(f"open {key[6:]}", 0))
                if getattr(desk, "opening", None): desk.opening.join()
            for what, do in clicks(desk):
                worst[what] = max(held(do), worst.get(what, 0))
                rest()
            desk.beat.stop()
        os.chdir(here)
    for what, ms in worst.items(): print(json.dumps(dict(bench="ui", what=what, ms=round(ms, 1), share=round(ms / 100, 3))))
    what = max(worst, key=worst.get)
    print(json.dumps(dict(bench="ui", worst=what, ms=round(worst[what], 1), share=round(worst[what] / 100, 3), rounds=ROUNDS)))


if __name__ == "__main__": main()
