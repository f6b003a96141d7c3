"""Guards of every private name of torch that is used: each fails when torch changes what it means."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from syncaccum import torch_private


def test_the_base_of_every_batch_norm() -> None:
    for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(cls, torch_private.BatchNormBase)
    assert not issubclass(nn.InstanceNorm1d, torch_private.BatchNormBase)


def test_a_hook_runs_in_backward_and_code_around_it_does_not() -> None:
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(torch_private.runs_in_backward()))
    assert not torch_private.runs_in_backward()
    x.sum().backward()
    assert not torch_private.runs_in_backward()
    assert seen == [True]


def test_each_backward_has_a_number() -> None:
    seen = []
    x = torch.ones(1, requires_grad=True)
    for _ in range(2):
        outputs = [x * factor for factor in (1, 2)]
        for output in outputs:
            output.register_hook(lambda _: seen.append(torch_private.number_of_backward()))
        sum(outputs).backward()
    assert torch_private.number_of_backward() == -1
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert -1 not in seen


def test_what_a_module_owns() -> None:
    outer = nn.Sequential(nn.BatchNorm1d(2))
    assert torch_private.buffers_of(outer) == torch_private.parameters_of(outer) == {}
    assert torch_private.submodules_of(outer) == {"0": outer[0]}
    assert torch_private.buffers_of(outer[0])["running_mean"] is outer[0].running_mean
    assert torch_private.parameters_of(outer[0]) == {"weight": outer[0].weight, "bias": outer[0].bias}


def test_many_tensors_at_once() -> None:
    tensors = [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.tensor(1)]
    torch_private.add_to_all(tensors, 2)
    assert [t.tolist() for t in tensors] == [[3, 3], [3, 3, 3], 3]
    torch_private.copy_all(tensors[:2], [torch.zeros(2, dtype=torch.float64), torch.ones(3)])
    assert [t.tolist() for t in tensors] == [[0, 0], [1, 1, 1], 3]
    torch_private.add_to_all(tensors[:2], [torch.ones(2), torch.full((3,), 2.0)])
    assert [t.tolist() for t in tensors] == [[1, 1], [3, 3, 3], 3]
    scaled = torch_private.scale_each(tensors[:2], [2.0, 0.5])
    assert [t.tolist() for t in [*scaled, *tensors[:2]]] == [[2, 2], [1.5, 1.5, 1.5], [1, 1], [3, 3, 3]]
    torch_private.take_from_all(tensors[:2], [torch.ones(2), torch.full((3,), 2.0)])
    assert [t.tolist() for t in tensors] == [[0, 0], [1, 1, 1], 3]
    torch_private.zero_all(tensors)
    assert not any(t.any() for t in tensors)
    names = ("copy_all", "add_to_all", "take_from_all", "zero_all")
    for function in (getattr(torch_private, name) for name in names):
        assert isinstance(function, types.BuiltinFunctionType)  # else signal handlers come between its bytecodes


def test_modes_do_not_see_calls_without_torch_function() -> None:
    mode = _FunctionMode()
    with mode:
        with torch_private.without_torch_function():
            torch_private.zero_all([torch.ones(1)])
        assert mode.calls == 0
        torch_private.zero_all([torch.ones(1)])
    assert mode.calls > 0


def test_nodes_are_numbered_by_thread_and_a_backward_walks_the_later_first() -> None:
    seen: list[str] = []
    x = torch.ones(1, requires_grad=True)
    before = torch_private.count_node()
    first = x * 2
    between = torch_private.count_node()
    second = x * 3
    assert torch_private.count_node() - before == 4
    assert between - before == 2
    first.register_hook(lambda _: seen.append("first"))
    second.register_hook(lambda _: seen.append("second"))
    (first + second).backward()
    assert seen == ["second", "first"]
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch_private.count_node).result() == 0


def test_what_a_module_calls_around_its_forward() -> None:
    module = nn.Identity()
    before = module.register_forward_pre_hook(lambda module, args: None)
    after = module.register_forward_hook(lambda module, args, output: None)
    found = torch_private.forward_hooks_of(module)
    assert [list(hooks) for hooks in found] == [[before.id], [after.id]]
    seen: list[str] = []
    found[0][before.id] = lambda module, args: seen.append("before")
    found[1][after.id] = lambda module, args, output: seen.append("after")
    module(1)
    assert seen == ["before", "after"]


def test_fully_shard_has_a_hook_before_and_a_hook_behind_a_forward(group: None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_forward_hook(lambda module, args, output: None)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard([model[0], model[1]], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert [torch_private.is_fully_sharded(m) for m in (model, *model)] == [True, True, True, False]
    for module, count in ((model, 1), (model[0], 1), (model[1], 1), (model[2], 0)):
        for hooks in torch_private.forward_hooks_of(module):
            methods = [torch_private.method_of_fully_shard(hook) for hook in hooks.values()]
            assert sum(method is not None for method in methods) == count


def test_fsdp_looks_for_its_methods_where_gates_are_put(group: None) -> None:
    model = nn.Linear(2, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    register_fsdp_forward_method(model, "extra_repr")
    seen: list[Any] = []
    for hooks in torch_private.forward_hooks_of(model):
        (method,) = [m for hook in hooks.values() if (m := torch_private.method_of_fully_shard(hook)) is not None]

        def look(*values: Any, method: Any = method) -> Any:
            seen.append(values)
            return method(*values)

        vars(method.__self__)[method.__name__] = look
    text = model.extra_repr()
    assert seen == [(model, (), {}), (model, (), text)]


def test_the_sharded_modules_in_whose_forward_we_are(group: None) -> None:
    seen: list[list[nn.Module]] = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch_private.sharded_forwards())
            return super().forward(x)

    model = nn.Sequential(nn.Sequential(Looks(2, 2)))
    for module in (model[0][0], model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    assert torch_private.sharded_forwards() == []
    model(torch.ones(1, 2))
    assert seen == [[model[0][0], model]]


def test_tensors_are_mapped_wherever_a_forward_may_return_them() -> None:
    x = torch.ones(1)
    mapped = torch_private.map_tensors(lambda t: t + 1, {"a": [x, (x, 3)], "b": None})
    assert mapped == {"a": [x + 1, (x + 1, 3)], "b": None}


def test_the_ddp_in_whose_forward_we_are(group: None) -> None:
    seen = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch_private.ddp_in_forward())
            return super().forward(x)

    ddp = DistributedDataParallel(Looks(2, 2))
    assert torch_private.ddp_in_forward() is None
    ddp(torch.ones(1, 2))
    assert torch_private.ddp_in_forward() is None
    assert seen == [ddp]


def test_the_note_of_whose_forward_we_are_in(group: None) -> None:
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    torch_private.set_ddp_in_forward(ddp)
    assert torch_private.ddp_in_forward() is ddp
    torch_private.set_ddp_in_forward(None)
    assert torch_private.ddp_in_forward() is None


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_a_reducer_that_is_made_ready_again_looks_behind_these_outputs(group: None) -> None:
    heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = heads

        def forward(self, index: int) -> dict[str, list[Tensor]]:
            return {"y": [self.heads[index](torch.ones(1, 2))]}

    ddp = DistributedDataParallel(Heads(), find_unused_parameters=True)
    with ddp.no_sync():
        first = ddp(0)
    outputs = torch_private.tensors_in([first, ddp(1)])
    assert [y.shape for y in outputs] == [(1, 2)] * 2
    torch_private.prepare_for_backward(ddp, outputs)
    sum(y.sum() for y in outputs).backward()  # else: a variable is marked ready twice
    assert [head.bias.grad is None for head in heads] == [False, False, True]


def test_the_stance_of_the_compiler() -> None:
    before = torch_private.compile_stance()
    torch.compiler.set_stance("force_eager")
    assert torch_private.compile_stance() != before
    torch_private.restore_compile_stance(before)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert graphs == [1]


def test_how_often_a_tensor_was_written_to() -> None:
    layers = [nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)]
    for layer in layers:
        before = [torch_private.version_of(b) for b in layer.buffers()]
        layer(torch.randn(3, 2, 4))
        assert [torch_private.version_of(b) for b in layer.buffers()] != before
    with torch.inference_mode():
        assert torch_private.version_of(torch.ones(1)) == 0


def test_the_settings_of_ddps_join(group: None) -> None:
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    seen = []
    with ddp.join(throw_on_early_termination=True):
        seen.append(torch_private.join_settings(ddp))
        ddp(torch.ones(1, 2)).sum().backward()
    (settings,) = seen
    assert (settings.enable, settings.throw_on_early_termination, settings.is_first_joinable) == (True, True, True)
    torch_private.set_join_settings(ddp, enable=False)
    assert not torch_private.join_settings(ddp).enable
    assert torch_private.join_settings(ddp).throw_on_early_termination


def test_the_innermost_saved_tensor_hooks() -> None:
    def pack(tensor: Tensor) -> Tensor:
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor * 2

    assert torch_private.saved_tensor_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(pack, pack), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert torch_private.saved_tensor_hooks() == (pack, unpack)


def test_all_saved_tensor_hooks_stay_in_force() -> None:
    def packs(tensor: Tensor) -> Tensor:
        return tensor

    def unpacks(tensor: Tensor) -> Tensor:
        return tensor * 2

    saving, both = torch.autograd.graph.saved_tensors_hooks, [(packs, unpacks), (packs, packs)]
    assert torch_private.all_saved_tensor_hooks() == []
    with saving(packs, packs):
        with saving(packs, unpacks):
            for _ in range(2):
                assert torch_private.all_saved_tensor_hooks() == both
        assert torch_private.all_saved_tensor_hooks() == both[1:]
    assert torch_private.all_saved_tensor_hooks() == []


class _FunctionMode(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class _DispatchMode(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_function_modes_are_seen_and_put_in_force() -> None:
    mode = _FunctionMode()
    with mode:
        assert torch_private.function_modes() == [mode]
    mode.calls = 0
    with torch_private.in_function_mode(mode):
        torch.add(torch.ones(1), 1)
    assert mode.calls == 2
    torch.add(torch.ones(1), 1)
    assert mode.calls == 2
    assert torch_private.function_modes() == []


def test_dispatch_modes_are_seen_and_put_in_force() -> None:
    mode = _DispatchMode()
    with mode:
        assert torch_private.dispatch_modes() == [mode]
    mode.calls = 0
    with torch_private.in_dispatch_mode(mode):
        torch.add(torch.ones(1), 1)
        with torch_private.without_dispatch_modes():
            torch.add(torch.ones(1), 1)
            assert torch_private.dispatch_modes() == []
        assert torch_private.dispatch_modes() == [mode]
    assert mode.calls == 2
    assert torch_private.dispatch_modes() == []


def test_no_other_file_of_the_package_names_one() -> None:
    package = Path(torch_private.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if path.name == "torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                found += [(path.name, part) for part in parts if part.startswith("_")]
            if isinstance(node, ast.Attribute) and _is_of_torch(node) and node.attr.startswith("_"):
                found.append((path.name, node.attr))
    assert not [where for where in found if not where[1].endswith("__")]


def _is_of_torch(node: ast.AST) -> bool:
    """Whether an attribute is reached from the name ``torch`` or ``dist``, or from a DDP."""
    while hasattr(node, "value"):
        node = node.value
    return getattr(node, "id", None) in ("torch", "dist", "ddp", "DistributedDataParallel", "nn", "F")


def test_whether_something_else_than_backward_differentiates() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_private.is_transformed())
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    with forward_ad.dual_level():
        look(torch.ones(2))
    look(torch.ones(2, requires_grad=True)).backward()
    assert seen == [False, True, True, True, False]


def test_tensors_inside_transforms() -> None:
    x = torch.arange(6.0).view(2, 3)
    outside = torch.zeros(3)
    seen = []

    def forward(row: Tensor) -> Tensor:
        seen.append((torch_private.is_in_vmap(row), torch_private.take_out_of_transforms(row).shape))
        with torch_private.outside_transforms():
            outside.add_(1)  # torch.func would refuse it
        return row.sum()

    torch.func.vmap(torch.func.grad(forward))(x)
    torch.func.grad(forward)(x[0])
    assert seen == [(True, (2, 3)), (False, (3,))]
    assert outside.tolist() == [2, 2, 2]


def test_tensors_that_are_given_to_functional_call() -> None:
    seen = []

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(list(torch_private.given_to_functional_call()))
            return x

    module, x, given = Looks(1, 1), torch.ones(1, 1), torch.zeros(1)
    functional_call(module, {"bias": given}, (x,))
    torch.func.grad(lambda bias: functional_call(module, ({"bias": bias}, {"weight": x}), (x,)).sum())(given)
    module(x)
    assert [len(tensors) for tensors in seen] == [1, 2, 0]
    assert seen[0][0] is given
    assert seen[1][1] is x


def test_ddp_sorts_its_buckets_once_after_a_backward(group: None) -> None:
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    ddp(torch.ones(1, 2)).sum().backward()
    torch_private.rebuild_buckets(ddp)
    # There is nothing left for its next forward to do.
    assert not ddp.reducer._rebuild_buckets()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_modes_and_traces_watch_each_operator() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch_private.is_watched(), torch_private.is_traced()))
        return x

    x = torch.ones(1)
    look(x)
    with TorchDispatchMode():
        look(x)
    torch.jit.trace(look, torch.ones(1), check_trace=False)
    assert seen == [(False, False), (True, False), (True, True)]
    assert not torch_private.is_watched()
