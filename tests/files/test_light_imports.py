"""torch and transformers without torch's compiler, in a process of its own: this one has torch already."""

import subprocess
import sys

from conftest import ROOT

CODE = """
import sys
import mpa.files.light_imports, torch, transformers, torchvision
from torchvision.transforms.v2 import functional
from transformers.models.qwen2_vl import modeling_qwen2_vl
assert "torch._dynamo.eval_frame" not in sys.modules
torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).zero_grad()
assert "torch._dynamo.eval_frame" not in sys.modules
compiled = torch.compile(torch.nn.Linear(2, 2), backend="eager")
assert compiled(torch.ones(2)).shape == (2,)
assert isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule) and torch._dynamo.utils.counters["frames"]
"""


def test_torchs_compiler_is_not_loaded_until_something_is_compiled_and_then_works():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
