"""Logs of other people's programs, and ModelLink's own numbers on NPUs; the two commands from a shell, with their exit codes."""
import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import pytest
from ascend_nb.cli import main
from ascend_nb.config import PlotLogConfig
from ascend_nb.core import UserError
from ascend_nb.training_logs import compare_logs, read_log, run, speed_of


@pytest.fixture(scope="module")
def baselines(shared_data):
    folder = shared_data / "npu_baselines"
    if not folder.is_dir(): pytest.skip(f"no baselines at {folder}")
    return sorted(folder.rglob("*.json"))


def shell(*words):
    "The command in this process: exit code, and what it prints."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(w) for w in words])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_a_real_log_of_megatron(shared_data):
    "All 62 steps, against a plain search of the text."
    path = shared_data / "logs/bigscience_gpt2_meg_ds_3d.out"
    if not path.is_file(): pytest.skip(f"no log at {path}")
    t, text = read_log(path), path.read_text(encoding="utf-8", errors="replace")
    losses = [float(x.split("|")[0]) for x in text.split("lm loss: ")[1:] if "|" in x[:20]]
    assert t.loss.dropna().tolist() == losses[:len(t)] and len(t) == text.count("elapsed time per iteration") == 62
    assert t.seconds[0] == pytest.approx(144.9156) and t.samples.iloc[-1] == 1024 * 62
    assert t.memory[0] == max(float(x.split()[0]) for x in text.split("(after 1 iterations)")[1:] for x in [x.split("max allocated: ")[1]])


def test_every_baseline_of_modellink(baselines):
    for path in baselines:
        t, d = read_log(path), json.loads(path.read_text())
        assert t.loss.tolist() == d["lm loss"] and t.tflops.tolist() == d["throughput"]
        assert all(r["ok"] for r in compare_logs(t, t, PlotLogConfig()))
    assert len(baselines) == 20


def test_two_layouts_of_one_model(baselines):
    "ModelLink measured LLaMA2 twice with other settings: near each other in the loss only within a tolerance."
    a, b = (next(p for p in baselines if p.name == f"llama2_tp2_pp4_vpp2_{n}.json") for n in ("ptd", "swap"))
    off = max(abs(x - y) / y for x, y in zip(json.loads(a.read_text())["lm loss"], json.loads(b.read_text())["lm loss"], strict=True))
    for allowed in (off * 1.01, off * .99):
        out = run(PlotLogConfig(files=[str(a)], baseline=str(b), out="", loss_tolerance=allowed, speed_tolerance=0, memory_tolerance=0), json=True)
        assert out["comparison"][0]["off"] == pytest.approx(off) and out["exit_code"] == (allowed < off)


def lines(d): # what Megatron prints of a baseline
    return "\n".join(f" [2024-09-01 10:00:00] iteration {i:8d}/{15:8d} | consumed samples: {16 * i:12d} | elapsed time per iteration (ms): 1500.0 | throughput per GPU (TFLOP/s/GPU): {s:.1f} | learning rate: 1.250000E-06 | global batch size:    16 | lm loss: {x:.6E} | loss scale: 1.0 | grad norm: 1.000 | number of skipped iterations:   0 | number of nan iterations:   0 |" for i, (x, s) in enumerate(zip(d["lm loss"], d["throughput"], strict=True), 1)) + "\n"


def test_the_command_and_its_exit_codes(baselines, tmp_path):
    base = next(p for p in baselines if p.name == "llama2_tp2_pp4_vpp2_ptd.json")
    d = json.loads(base.read_text())
    (tmp_path / "same.log").write_text(lines(d))
    (tmp_path / "off.log").write_text(lines(d | {"lm loss": [x * 1.05 for x in d["lm loss"]]}))
    (tmp_path / "slow.log").write_text(lines(d | {"throughput": [x * .8 for x in d["throughput"]]}))
    for name, code, word in (("same.log", 0, "within"), ("off.log", 1, "loss: +5.00% (allowed 2.00%)"), ("slow.log", 1, "tflops: +20.0")):
        out = shell("plot-log", tmp_path / name, "--baseline", base, "--out", "" if code else tmp_path / "x.svg")
        assert out.returncode == code and word in out.stdout, out
    assert (tmp_path / "x.svg").read_text().count("<path") > 20


def test_mistakes_of_both_commands_end_with_two(tmp_path, samples):
    (tmp_path / "a.log").write_text("nothing here\n")
    other = shutil.copytree(samples / "npu_profile", tmp_path / "other")
    csv = other / "rank1_ascend_pt/ASCEND_PROFILER_OUTPUT/step_trace_time.csv"
    csv.write_text(csv.read_text().replace("\n0,6,", "\n0,7,"))
    (tmp_path / "empty").mkdir()
    for words, said in ((("plot-log",), "Found no log"), (("plot-log", tmp_path / "a.log"), "Found no step"), (("plot-log", tmp_path / "b.log"), "Found nothing at"), (("profile", tmp_path / "empty"), "Found no profile"), (("profile", other), "Found other steps in rank 1 (5, 7)"), (("profile", samples / "npu_profile", "--perfetto", tmp_path / "p", "--steps", "9", "9"), "Found no step 9-9"),
                        (("profile", samples / "npu_profile", "--device", "atlas-a9"), "To add one")):
        out = shell(*words)
        assert out.returncode == 2 and said in out.stderr and out.stderr.count("\n") == 1, out


@pytest.mark.slow
def test_tensorboards_events(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    w = SummaryWriter(str(tmp_path))
    for i in range(1, 6): w.add_scalar("lm loss", 3. / i, i); w.add_scalar("grad-norm", i, i); w.add_scalar("iteration-time", .5, i)
    w.close()
    t = read_log(tmp_path)
    assert t.step.tolist() == [1, 2, 3, 4, 5] and t.loss[2] == pytest.approx(1.) and speed_of(t)[1].tolist() == [2.] * 5


def test_nothing_in_common_is_a_mistake(tmp_path):
    for name, first in (("a", 1), ("b", 9)):
        (tmp_path / f"{name}.log").write_text("".join(f"iteration {i}/ 20 | lm loss: 1.0E+00 |\n" for i in range(first, first + 4)))
    with pytest.raises(UserError, match="1-4 in the log and 9-12"): run(PlotLogConfig(files=[str(tmp_path / "a.log")], baseline=str(tmp_path / "b.log"), out=""))


def test_what_is_no_number_is_left_out_and_json_stays_json(tmp_path):
    "Torn lines, nulls, words and NaN in every kind of log: the rest is read, and --json prints what any reader of JSON takes."
    line = lambda i, **k: f"iteration {i}/ 9 | elapsed time per iteration (ms): {k.get('ms', 10)} | lm loss: {k.get('loss', 2.)} |"
    (tmp_path / "a.log").write_text("\n".join([line(1), line(2, loss="nan"), line(3, ms=0), "iteration 4/ 9 | lm lo", "validation loss at iteration 4 | lm loss value: ... |", line(5, loss="inf")]))
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0, "tokens_per_s": "fast"}\n{"step": "x", "loss": 1}\n{"step": 1e999, "loss": 1}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.5, "grad_norm": [1]}\n{"st')
    (tmp_path / "b.json").write_text('{"lm loss": [2.0, "a", null], "throughput": [0, 0, 0], "memo info": [{"max allocated memory": "x"}, {"max allocated memory": 0}]}')
    for name, steps, ends, without in (("a.log", 5, (2., 2.), 3), ("m.jsonl", 3, (3., 1.5), 1), ("b.json", 3, (2., 2.), 2)):
        out = shell("plot-log", tmp_path / name, "--baseline", tmp_path / "b.json", "--out", tmp_path / "x.png", "--json")
        told = json.loads(out.stdout, parse_constant=pytest.fail)["logs"][str(tmp_path / name)]
        assert (told["steps"], (told["first_loss"], told["last_loss"]), told["without_loss"]) == (steps, ends, without), told
        assert out.returncode == 1, "a loss that is missing in one of both is no agreement"
