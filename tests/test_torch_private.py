"""Uses of torch's private interfaces are in one module, and the public fallbacks compute the same."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from forked import Forked
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from esvit_core import torch_private
from esvit_core.kernels.onednn_linear import linear
from esvit_core.models.heads import Prototypes
from esvit_core.models.layers.activation_checkpointing import checkpoint_activation
from esvit_core.training.optim.optimizer import clip_gradients_, update_teacher_

ROOT = Path(__file__).parent.parent
LOOKED_UP = [name for name in vars(torch_private) if name.startswith("_") and f"{name} = _" in Path(torch_private.__file__).read_text()]  # fmt: skip
PLANNING = {"esvit_core/planning/count_operations.py", "esvit_core/planning/fake_network.py"}  # fake tensors


@pytest.fixture(params=["private", "public"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with torch as it is, and as if it had none of the private names."""
    for name in LOOKED_UP:
        if request.param == "public":
            monkeypatch.setattr(torch_private, name, None)
        else:
            assert getattr(torch_private, name) is not None, f"{name}: gone from torch {torch.__version__}"
    return request.param


def test_no_other_module_reaches_into_torch() -> None:
    found = []
    for folder in ("esvit_core", "components", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if name != "esvit_core/torch_private.py" and name not in PLANNING:
                found += [f"{name}: {use}" for use in private_uses(path)]
    assert found == []


def private_uses(path: Path) -> list[str]:
    """Private names below torch in a file, and classes of objects that are exchanged."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("torch", "torchvision"):
            found += [f"{node.module}.{a.name}" for a in node.names if re.search(r"(^|\.)_", f"{node.module}.{a.name}")]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.match(r"(torch|dist)\.(\w+\.)*_[a-z]", text) or text.endswith("._cdata"):
                found.append(text)
        elif isinstance(node, ast.Assign) and "__class__" in ast.unparse(node.targets[0]):
            found.append(ast.unparse(node))
    return found


def test_the_reader_of_private_uses_finds_them(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch\nfrom torch.utils._pytree import tree_leaves\ntorch._foreach_norm([])\n"
        "torch.ops.mkldnn._linear_pointwise()\nx.__class__ = int\ntorch.nn.Linear(1, 1).weight\n"
    )
    assert private_uses(path) == [
        "torch.utils._pytree.tree_leaves",
        "x.__class__ = int",
        "torch._foreach_norm",
        "torch.ops.mkldnn._linear_pointwise",
    ]


def test_the_bound_of_torch_is_the_version_that_is_tested() -> None:
    """`constraints.txt` is what every test runs with; pyproject.toml allows no newer minor version."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    constraints = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "torchvision"):
        bound = next(d for d in dependencies if re.match(rf"{name}[><=]", d))
        major, minor = re.search(rf"^{name}==(\d+)\.(\d+)", constraints, re.MULTILINE).groups()
        assert bound.endswith(f",<{major}.{int(minor) + 1}"), bound
    tested = re.search(r"^torch==(.*)$", constraints, re.MULTILINE)[1]
    assert torch.__version__.partition("+")[0] == tested


def test_linear_layers_compute_the_product(way: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(7, 5), torch.randn(3, 5, requires_grad=True), torch.randn(3)
    torch_private.onednn_linear(x, weight.detach(), bias)
    out = linear(x, weight, bias)
    out.sum().backward()
    torch.testing.assert_close(out, x @ weight.T + bias)
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 5))
    assert torch_private.has_onednn_linear() == (way == "private")


def test_what_is_recomputed_has_the_same_gradients(way: str) -> None:
    """The public fallback saves what the private way recomputes."""
    torch.manual_seed(0)
    calls, layer, x = [], nn.Linear(16, 8), torch.randn(4, 16, requires_grad=True)

    def function(t: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return torch.nn.functional.gelu(t)

    checkpoint_activation(function, x, layer).sum().backward()
    assert len(calls) == (2 if way == "private" else 1)
    plain = x.detach().clone().requires_grad_()
    layer(torch.nn.functional.gelu(plain)).sum().backward()
    assert torch.equal(x.grad, plain.grad)


def test_no_fake_tensor_gets_into_a_cache(way: str) -> None:
    @functools.lru_cache
    def cached(n: int) -> torch.Tensor:
        return torch.from_numpy(__import__("numpy").arange(n))

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch_private.outside_modes(cached, 3).shape == (3,)
        assert 0 <= torch_private.draw_below(8) < 8
    assert torch_private.outside_modes(cached, 3).tolist() == [0, 1, 2]
    assert torch_private.outside_modes(cached, 3) is torch_private.outside_modes(cached, 3)


def test_a_draw_is_the_generator_s(way: str) -> None:
    torch.manual_seed(3)
    expected = [int(torch.randint(8, ())) for _ in range(5)]
    torch.manual_seed(3)
    assert [torch_private.draw_below(8) for _ in range(5)] == expected


def test_gradients_are_clipped_and_the_teacher_follows(way: str) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4, 0.0])
    torch.testing.assert_close(clip_gradients_(parameters, 1.0), torch.tensor(25.25).sqrt())
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.3, 0.4, 0.0]))
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.9 * teacher.weight.detach() + 0.1 * student.weight.detach()
    update_teacher_(student, teacher, 0.9)
    torch.testing.assert_close(teacher.weight.detach(), expected)


def test_tensors_are_converted(way: str) -> None:
    targets, sources = [torch.empty(2, dtype=torch.bfloat16), torch.empty(1)], [torch.rand(2), torch.rand(1)]
    torch_private.convert_(targets, sources)
    assert torch.equal(targets[0], sources[0].bfloat16()) and torch.equal(targets[1], sources[1])


def test_prototypes_have_the_length_that_is_set(way: str) -> None:
    prototypes = Prototypes(4, 6)
    expected = nn.functional.normalize(prototypes.weight_v, dim=1)
    torch.testing.assert_close(prototypes.weight(), expected)


def test_tensors_of_one_memory_have_one_key(way: str) -> None:
    x = torch.randn(4, 3)
    assert torch_private.storage_key(x) == torch_private.storage_key(x[1:].T) != torch_private.storage_key(x.clone())


AGENT = """
import sys
from esvit_core import torch_private
from esvit_core.launch import agent
{change}
sys.exit(agent.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("change", "starts"),
    [("", 1), ("torch_private._agent_can_be_watched = lambda *_: False", 3)],
    ids=["private", "public"],
)
def test_a_mistake_ends_torchrun_with_its_exit_code(change: str, starts: int, tmp_path: Path) -> None:
    """Where the agent cannot be asked, it uses up its restarts first."""
    script = tmp_path / "train.py"
    script.write_text(f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\nraise SystemExit(2)\n")
    options = ["--standalone", "--nproc_per_node", "1", "--max-restarts", "2", "--monitor-interval", "0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    agent = Forked(AGENT.format(change=change), *options, str(script), environment=environment)
    output, errors = agent.communicate(timeout=250)
    assert agent.returncode == 2, errors
    assert len((tmp_path / "starts").read_text()) == starts
    assert ("restarts processes even after a user error" in output) == (starts > 1)


STEPS = """
import sys, torch
if "without" in sys.argv:
    from esvit_core.torch_private import import_timm_without_dynamo
    import_timm_without_dynamo()
import esvit_core.training.main
from esvit_core.training.nonfinite import backward
from esvit_core.training.state import make_deterministic

make_deterministic()
torch.manual_seed(0)
layers = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
optimizers = [torch.optim.AdamW(layers[0].parameters(), fused=True), torch.optim.SGD(layers[1].parameters(), momentum=0.9)]
for layer, optimizer in zip(layers, optimizers):
    for _ in range(2):
        optimizer.zero_grad()
        backward(layer(torch.ones(3)).square().sum())
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
found = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
compiled = torch.compile(layers[0].forward, backend="eager")
import torchvision
boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
print(found)
print(layers[0].weight.tolist(), layers[1].weight.tolist(), compiled(torch.ones(3)).tolist())
print(torchvision.ops.roi_align(torch.arange(64.0).reshape(1, 1, 8, 8), boxes, 2).tolist())
"""


def test_a_training_does_not_import_the_compiler_and_computes_the_same(
    torch_settings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiler takes a third of the time until a training starts."""
    done = subprocess.run([sys.executable, "-c", STEPS, "without"], capture_output=True, text=True, timeout=250)
    found, *without = done.stdout.splitlines()
    exec(STEPS, {})
    compiler, *usual = capsys.readouterr().out.splitlines()
    assert found == "[]" and "torch._dynamo" in compiler
    assert without == usual and len(usual) == 2


OTHER_VERSION = """
import sys, torch
from esvit_core import torch_private
with torch_private._dynamo_on_demand():
    compiled_later = torch.compiler.disable(lambda: 3, reason="a further argument")
    assert "torch._dynamo" not in sys.modules
    from torch._dynamo.utils import counters
assert compiled_later() == 3 and sys.modules["torch._dynamo.utils"].counters is counters
"""


def test_what_another_version_of_timm_or_torchvision_asks_of_the_compiler_is_found() -> None:
    done = subprocess.run([sys.executable, "-c", OTHER_VERSION], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
