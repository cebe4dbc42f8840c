"""What a model file sets for all of PyTorch decides no number."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from chunkflow_core.engines.settings import held, settle
from chunkflow_core.errors import SpecError
from chunkflow_core.spec import load_spec
from tests.support.models.forms import NET, pytorch, write
from tests.support.models.loading import MakeSpec, Section, load, patches

SETTINGS = {
    # what a model file says: what changes by that
    'torch.backends.fp32_precision = "tf32"': "torch.backends.fp32_precision",
    'torch.set_float32_matmul_precision("medium")': "torch.backends.cuda.matmul.fp32_precision",
    'torch.backends.cudnn.conv.fp32_precision = "tf32"': "torch.backends.cudnn.conv.fp32_precision",
    'torch.backends.mkldnn.conv.fp32_precision = "bf16"': "torch.backends.mkldnn.conv.fp32_precision",
    'torch.backends.mkldnn.matmul.fp32_precision = "bf16"': "torch.backends.mkldnn.matmul.fp32_precision",
    "torch.backends.cuda.matmul.allow_tf32 = True": "torch.backends.cuda.matmul.fp32_precision",
    "torch.backends.cudnn.allow_tf32 = True": "torch.backends.cudnn.conv.fp32_precision",
    "torch.backends.cuda.matmul.allow_fp16_accumulation = True": "torch.backends.cuda.matmul.allow_fp16_accumulation",
    "torch.backends.cudnn.benchmark = True": "torch.backends.cudnn.benchmark",
    "torch.backends.cudnn.enabled = False": "torch.backends.cudnn.enabled",
    "torch._C._set_mkldnn_enabled(False)": "torch.backends.mkldnn.enabled",
    "torch.use_deterministic_algorithms(False)": "torch.set_deterministic_debug_mode",
    "torch.set_flush_denormal(True)": "torch.set_flush_denormal",
    "torch.set_num_threads(3)": "torch.set_num_threads",
}
HELD = pytest.mark.parametrize("setting", SETTINGS)


def refused(setting: str) -> str:
    """What is said of a network that changes a setting while it runs."""
    return rf"model\.path: model\.py sets .*{SETTINGS[setting].replace('.', '[.]')}.* while it runs"


@pytest.fixture(autouse=True)
def settled(make_spec: MakeSpec) -> None:
    """No test finds what the one before it has set."""
    settle(load_spec(make_spec()))


def looks() -> list[object]:
    """What PyTorch says of its settings, and computes."""
    backends = torch.backends
    return [
        torch.get_float32_matmul_precision(),
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
        [backends.cudnn.conv.fp32_precision, backends.mkldnn.conv.fp32_precision],  # type: ignore[attr-defined]
        [backends.mkldnn.matmul.fp32_precision, backends.fp32_precision],  # type: ignore[attr-defined]
        backends.cuda.matmul.allow_fp16_accumulation,
        [backends.cudnn.benchmark, backends.cudnn.enabled, backends.mkldnn.enabled],
        torch.are_deterministic_algorithms_enabled(),
        (torch.tensor([1e-40]) * 0.5).item() > 0,
        torch.get_num_threads(),
    ]


@HELD
def test_what_a_model_file_sets_when_it_is_loaded_is_undone(
    make_spec: MakeSpec, tmp_path: Path, output: Section, setting: str
) -> None:
    """Published model files set these for all of PyTorch, to train faster."""
    write(tmp_path, f"{NET}\n{setting}\nInstantiatedModel = Net()\n")
    path = make_spec(model=pytorch(weights=...), output=output)

    load(path)(patches())

    expected = ["highest", False, False, ["ieee", "ieee"], ["ieee", "ieee"], False, [False, True, True], True, True, 1]
    assert looks() == expected
    assert import_module("torch._inductor.config").deterministic
    with held(load_spec(path)):
        pass


@pytest.mark.parametrize("before", [None, "0"])
def test_so_is_what_it_says_in_the_environment(
    make_spec: MakeSpec, tmp_path: Path, output: Section, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """NVIDIA's libraries take TensorFloat-32 by this variable, whatever PyTorch says."""
    variable = "NVIDIA_TF32_OVERRIDE"
    monkeypatch.delenv(variable, raising=False)
    if before is not None:
        monkeypatch.setenv(variable, before)
    text = f"import os\nos.environ['{variable}'] = '1'\nos.environ['CUBLAS_WORKSPACE_CONFIG'] = ':16:8'\n"
    write(tmp_path, f"{text}{NET}\nInstantiatedModel = Net()\n")
    load(make_spec(model=pytorch(weights=...), output=output))
    assert os.environ.get(variable) == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@HELD
def test_a_network_that_sets_it_while_it_runs_is_refused(
    make_spec: MakeSpec, tmp_path: Path, output: Section, setting: str
) -> None:
    text = f"{NET}\nclass Setting(Net):\n def forward(self, x):\n  {setting}\n  return super().forward(x)\n"
    write(tmp_path, f"{text}InstantiatedModel = Setting()\n")
    engine = load(make_spec(model=pytorch(weights=...), output=output))
    with pytest.raises(SpecError, match=refused(setting)):
        engine(patches())


@pytest.mark.parametrize(
    "text",
    [
        f"{NET}\nInstantiatedModel = Net()\ndef pre_process(patch):\n SETTING\n return torch.from_numpy(patch)\n",
        f"{NET}\nInstantiatedModel = Net()\ndef post_process(given):\n SETTING\n return given\n",
        f"{NET}\nnet = Net().eval()\nclass PatchInferencer:\n def __init__(self, weights): pass\n"
        " def __call__(self, patch):\n  SETTING\n  return net(torch.from_numpy(patch)).numpy()\n",
    ],
    ids=["pre_process", "post_process", "PatchInferencer"],
)
@pytest.mark.parametrize("engine", ["pytorch", "openvino"])
def test_so_are_the_functions_around_it(
    make_spec: MakeSpec, tmp_path: Path, output: Section, text: str, engine: str
) -> None:
    if engine == "openvino" and "PatchInferencer" in text:
        pytest.skip("OpenVINO runs none")
    setting = "torch.backends.cudnn.benchmark = True"
    write(tmp_path, text.replace("SETTING", f"if sets: {setting}") + "\nsets = False\n")
    run = load(make_spec(model=pytorch(weights=..., engine=engine), output=output))
    np.testing.assert_array_equal(run(patches(1)), run(patches(1)))
    vars(import_module("chunkflow_model"))["sets"] = True
    with pytest.raises(SpecError, match=refused(setting)):
        run(patches(1))
