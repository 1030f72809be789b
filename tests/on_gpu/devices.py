"""Where the tests of this folder run. What runs on either device does so on the CPU everywhere, so that the test itself
is known to work before somebody has a GPU."""

import pytest

on_gpu = pytest.mark.gpu
on_either = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
