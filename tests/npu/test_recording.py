"""torch_npu's own profiler takes what the run's knobs become: levels, activities, export, and steps that are numbered as in the log."""
import pytest
import torch_npu
from ascend_nb.config import ProfilingConfig
from ascend_nb.recording import _npu_profiler

P = torch_npu.profiler


@pytest.mark.parametrize("level, theirs, metrics", [("level_none", P.ProfilerLevel.Level_none, P.AiCMetrics.AiCoreNone), ("level0", P.ProfilerLevel.Level0, P.AiCMetrics.AiCoreNone), ("level1", P.ProfilerLevel.Level1, P.AiCMetrics.PipeUtilization), ("level2", P.ProfilerLevel.Level2, P.AiCMetrics.PipeUtilization)])
def test_levels(tmp_path, level, theirs, metrics, capsys):
    prof = _npu_profiler(ProfilingConfig(profile=True, profile_level=level, profile_with_cpu=True, profile_export_type="db", profile_with_stack=True, profile_record_shapes=True), tmp_path, 3, dict(rank=3))
    config = prof.prof_if.experimental_config
    if level != "level_none": assert config._profiler_level == theirs # torch_npu turns level_none into level0 where nothing marks ranges
    assert config._aic_metrics == metrics and config.export_type == [P.ExportType.Db]
    assert set(prof.prof_if.activities) == {P.ProfilerActivity.NPU, P.ProfilerActivity.CPU} and prof.prof_if.with_stack and prof.prof_if.record_shapes
    assert prof.metadata == {"distributed_args": {"rank": 3}}


def test_steps(tmp_path):
    prof = _npu_profiler(ProfilingConfig(profile=True, profile_step_start=105, profile_step_end=107), tmp_path, 0, {})
    prof.step_num, prof.current_action = 104, prof.schedule(104)
    assert prof.prof_if.activities == {P.ProfilerActivity.NPU}
    done = []
    prof.action_controller.transit_action = lambda a, b: done.append((a and a.name, b and b.name))
    prof.start(); [prof.step() for _ in range(3)]; prof.stop()
    assert [b for _, b in done] == ["WARMUP", "RECORD", "RECORD_AND_SAVE", "NONE", None]
