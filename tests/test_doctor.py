"""What `auxin doctor` finds of a machine that this one is not."""

import torch

from auxin import doctor


def test_on_a_gpu_it_says_how_to_check_what_nobody_has_checked_there(monkeypatch):
    here = doctor.diagnose()
    monkeypatch.setattr(doctor, "choose_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(doctor, "choose_precision", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(doctor, "peak_flops", lambda device, precision: 989.4e12)
    there = doctor.diagnose()
    assert there.used["peak"] == "9.89e+14 FLOP/s (MFU is reported)"
    told = [warning for warning in there.warnings if warning not in here.warnings]
    if not torch.cuda.is_available():
        assert len(told) == 1
        assert "python benchmarks/gpu.py" in told[0]
