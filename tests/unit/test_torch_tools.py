"""PyTorch's own tools on converted models, with nn.BatchNorm as the oracle: docs/pytorch.md has a row for each."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.package.package_exporter import PackageExporter
from torch.package.package_importer import PackageImporter

import syncaccum
from syncaccum import commit, convert_sync_accum, revert_sync_accum
from tests.oracle import assert_same_statistics

every_policy = pytest.mark.parametrize("policy", ["running", "renorm", "window"])
# Its advice to use torch.export or torch.compile instead.
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
QUANTIZED = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    # Of its own default settings.
    "ignore:Please use quant_min and quant_max:UserWarning",
)

# torch 2.9's, when it loads a graph.
LOADED = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
# Its own use of tensors.
PACKAGED = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


class Net(nn.Module):
    """Two layers side by side. What they see depends on no normalisation, so a plain twin knows what both must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x))) + self.bn2(self.conv2(x))


def make_plain() -> Net:
    torch.manual_seed(0)
    net = Net().double()
    for layer in (net.bn1, net.bn2):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return net


def make_converted(policy: str) -> Net:
    return convert_sync_accum(make_plain(), normalization=policy)


def make_trained(policy: str, seed: int = 0) -> tuple[Net, Net]:
    """A converted net and its plain twin after one window."""
    model, plain = make_converted(policy), make_plain()
    for m in (model, plain):
        m(draw(3, seed))
    commit(model)
    return model, plain


def draw(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 2


def windows(*sizes: Sequence[int]) -> Iterator[list[Tensor]]:
    """Of different lengths, with micro-batches of different sizes.

    Compilers treat sizes 0 and 1 apart, and take a size for fixed that equals a fixed one at first.
    """
    for number, window in enumerate(sizes or [(7, 2), (2, 4, 6), (8,)]):
        yield [draw(n, 10 * number + i) for i, n in enumerate(window)]


def assert_same_layers(model: nn.Module, plain: nn.Module) -> None:
    for name in ("bn1", "bn2"):
        assert_same_statistics(model.get_submodule(name), plain.get_submodule(name))


def assert_trains(policy: str, model: nn.Module, call: Callable[[Tensor], Any], owner: nn.Module | None = None) -> None:
    """A call of ``model`` through a tool trains it: outputs and gradients are those without the tool, statistics
    those of nn.BatchNorm on the whole window, and so is the eval forward.

    Args:
        owner: whose layers are committed, where they are not the model's own.
    """
    owner = model if owner is None else owner
    untouched, plain = make_converted(policy), make_plain()
    for window in windows():
        for x in window:
            seen = []
            for forward in (call, untouched):
                x = x.detach().requires_grad_()
                y = forward(x)
                y.square().sum().backward()
                seen.append((y.detach(), x.grad))
            torch.testing.assert_close(*seen)
        values = {commit(m).values["bn1"] for m in (owner, untouched)}
        assert values == {sum(len(x) for x in window) * 9}
        plain(torch.cat(window))
        assert_same_layers(owner, plain)
    for name, parameter in untouched.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    x = draw(4, 99)
    torch.testing.assert_close(owner.eval()(x), plain.eval()(x))


# --- graphs ----------------------------------------------------------------------------------------------------


@every_policy
def test_fx_traces_layers_as_leaves(policy: str) -> None:
    traced = torch.fx.symbolic_trace(make_converted(policy))
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == [
        "conv1",
        "bn1",
        "conv2",
        "bn2",
    ]
    assert_trains(policy, traced, traced)


def extract_features(model: nn.Module, *names: str) -> torch.fx.GraphModule:
    """As torchvision's create_feature_extractor: a traced graph that ends in other nodes."""
    graph = torch.fx.Tracer().trace(model)
    wanted = {node.name: node for node in graph.nodes if node.name in names}
    assert len(wanted) == len(names)
    graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
    graph.output(wanted)
    module = torch.fx.GraphModule(model, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@every_policy
def test_a_feature_extractor_trains_what_it_is_made_of(policy: str) -> None:
    extractor = extract_features(make_converted(policy), "relu", "bn2")

    def call(x: Tensor) -> Tensor:
        features = extractor(x)
        return features["relu"] + features["bn2"]

    model = make_converted(policy)
    whole = torch.fx.GraphModule(extractor, torch.fx.Tracer().trace(model))
    assert whole.bn1 is extractor.bn1
    assert_trains(policy, extractor, call, owner=whole)


@every_policy
def test_a_layer_that_a_feature_extractor_leaves_out_is_left_alone(policy: str) -> None:
    model, plain = make_converted(policy), make_plain()
    extractor = extract_features(model, "relu")
    x = draw(3, 0)
    extractor(x)
    plain(x)
    assert commit(model).values == {"bn1": 27, "bn2": 0}
    assert_same_statistics(model.bn1, plain.bn1)
    assert model.bn2.num_batches_tracked == 0


@every_policy
def test_an_exported_training_graph_accumulates_in_its_model(policy: str) -> None:
    model = make_converted(policy)
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=100)}}
    with pytest.warns(UserWarning, match=r"layer bn1 is exported in training mode.* commit this model"):
        exported = torch.export.export(model, (draw(3, 0),), dynamic_shapes=batch).module()
    assert_trains(policy, exported, exported, owner=model)


@LOADED
@every_policy
def test_a_saved_training_graph_is_refused_without_its_model(policy: str) -> None:
    with pytest.warns(UserWarning, match="do not save the graph"):
        program = torch.export.export(make_converted(policy), (draw(3, 0),))
    file = io.BytesIO()
    torch.export.save(program, file)
    del program  # the model goes with it
    gc.collect()
    file.seek(0)
    loaded = torch.export.load(file).module()
    with pytest.raises(RuntimeError, match="export it in eval mode"):
        loaded(draw(3, 0))


@LOADED
@every_policy
def test_an_exported_eval_graph_is_batch_norms_and_can_be_saved(policy: str) -> None:
    model, plain = make_trained(policy)
    x = draw(3, 0)
    program = torch.export.export(model.eval(), (x,))
    assert "syncaccum" not in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), plain.eval()(x))


@SCRIPTED
@every_policy
def test_jit_trace_of_an_eval_forward_is_batch_norms(policy: str) -> None:
    model, plain = make_trained(policy)
    traced = torch.jit.trace(model.eval(), draw(3, 0))
    x = draw(7, 1)
    torch.testing.assert_close(traced(x), plain.eval()(x))


@SCRIPTED
@every_policy
def test_jit_trace_of_a_training_forward_is_refused(policy: str) -> None:
    model = make_converted(policy)
    with pytest.raises(RuntimeError, match=r"layer bn1 in training mode.*call model\.eval\(\) before"):
        torch.jit.trace(model, draw(3, 0))
    assert model.bn1.window.count == 0


@SCRIPTED
@every_policy
def test_jit_script_names_the_layer_and_the_remedy(policy: str) -> None:
    model, plain = make_trained(policy)
    with pytest.raises(RuntimeError, match=r"layer bn1.*revert_sync_accum\(copy\.deepcopy\(model\)\)"):
        torch.jit.script(model)
    scripted: Any = torch.jit.script(revert_sync_accum(copy.deepcopy(model)))
    for mode in (True, False):
        x = draw(4, 1)
        torch.testing.assert_close(scripted.train(mode)(x), plain.train(mode)(x))
    # The model itself goes on accumulating.
    model.train()(draw(3, 0))
    assert commit(model).values == {"bn1": 27, "bn2": 27}


# --- compilers -------------------------------------------------------------------------------------------------


@every_policy
def test_compile_makes_one_graph_for_all_sizes_before_and_after_a_commit(policy: str) -> None:
    torch._dynamo.reset()
    model = make_converted(policy)
    # aot_eager: as inductor, without a C++ compiler.
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_trains(policy, model, compiled)


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")  # its own
@pytest.mark.parametrize("policy", ["renorm", "window"])  # "running" has no operator that these have not
def test_compiled_autograd_walks_the_same_backward(policy: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_converted(policy)

    def step(x: Tensor) -> Tensor:
        y = model(x)
        y.square().sum().backward()
        return y.detach()

    untouched, plain = make_converted(policy), make_plain()
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(step, backend="aot_eager")
        # Of one size: compiling takes long.
        for window in windows((4, 4), (4,), (4, 4)):
            for x in window:
                y = untouched(x)
                y.square().sum().backward()
                torch.testing.assert_close(compiled(x), y.detach())
            for m in (model, untouched):
                commit(m)
            plain(torch.cat(window))
            assert_same_layers(model, plain)
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] > 0
    for name, parameter in untouched.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


# --- copies and averages ---------------------------------------------------------------------------------------


def by_package(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    with PackageExporter(file) as exporter:
        exporter.extern(["syncaccum.**", "tests.**"])
        exporter.save_pickle("model", "model.pkl", model)
    file.seek(0)
    return PackageImporter(file).load_pickle("model", "model.pkl")


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
    "torch.package": by_package,
}


@PACKAGED
@every_policy
@pytest.mark.parametrize("by", COPIES)
def test_a_copy_trains_on_by_itself(policy: str, by: str) -> None:
    copied = COPIES[by](make_converted(policy))
    assert_trains(policy, copied, copied)


@PACKAGED
@every_policy
@pytest.mark.parametrize("by", COPIES)
def test_a_copy_in_the_middle_of_a_window_has_that_window(policy: str, by: str) -> None:
    model, plain = make_converted(policy), make_plain()
    first, *rest = windows()
    for m in (model, plain):
        m(torch.cat(first))
    commit(model)
    xs = rest[0]
    model(xs[0]).square().sum().backward()
    model.zero_grad()
    copied = COPIES[by](model)
    for m in (copied, model):
        for x in xs[1:]:
            m(x).square().sum().backward()
    commit(copied)
    assert model.bn1.window.count == sum(len(x) for x in xs) * 9
    commit(model)
    plain(torch.cat(xs))
    for m in (copied, model):
        assert_same_layers(m, plain)
    for one, other in zip(copied.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@every_policy
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_averages_what_it_does_of_batch_norm(policy: str, use_buffers: bool) -> None:
    model, plain = make_converted(policy), make_plain()
    averages = [AveragedModel(m, use_buffers=use_buffers) for m in (model, plain)]
    for window in windows():
        for x in window:
            model(x)
        commit(model)
        plain(torch.cat(window))
        for averaged, m in zip(averages, (model, plain), strict=True):
            with torch.no_grad():
                m.conv1.weight.add_(0.1)
            averaged.update_parameters(m)
    ours, theirs = (averaged.eval()(draw(4, 99)) for averaged in averages)
    torch.testing.assert_close(ours, theirs)


@every_policy
def test_update_bn_is_exact_after_a_commit(policy: str) -> None:
    model, plain = make_converted(policy), make_plain()
    data = torch.cat([x for window in windows() for x in window])
    for layer in (plain.bn1, plain.bn2):
        layer.momentum = None
    plain(data)
    averaged = AveragedModel(model)
    update_bn(data.split(3), averaged)
    with pytest.warns(UserWarning, match=r"update_bn does, syncaccum\.recalibrate\(model, batches\)"):
        averaged.eval()(data)
    commit(averaged)
    assert_same_layers(averaged.module, plain)
    assert (averaged.module.bn1.momentum, averaged.module.bn2.momentum) == (0.1, 0.3)


@every_policy
def test_recalibrate_is_update_bn_in_one_call(policy: str) -> None:
    averaged, plain = AveragedModel(make_converted(policy)), make_plain()
    data = torch.cat([x for window in windows() for x in window])
    for layer in (plain.bn1, plain.bn2):
        layer.momentum = None
    plain(data)
    syncaccum.recalibrate(averaged, data.split(3))
    assert_same_layers(averaged.module, plain)
    torch.testing.assert_close(averaged.eval()(data), plain.eval()(data))


@every_policy
def test_an_ema_copy_follows_as_batch_norms_does(policy: str) -> None:
    """As timm's ModelEma: a deep copy in eval mode, moved towards the state after each step."""
    model, plain = make_converted(policy), make_plain()
    copies = [copy.deepcopy(m).eval() for m in (model, plain)]
    for window in windows():
        for x in window:
            model(x)
        commit(model)
        plain(torch.cat(window))
        for ema, m in zip(copies, (model, plain), strict=True):
            for own, new in zip(ema.state_dict().values(), m.state_dict().values(), strict=True):
                own.copy_(own * 0.5 + new * 0.5)
        ours, theirs = (ema(draw(4, 99)) for ema in copies)
        torch.testing.assert_close(ours, theirs)
    assert model.bn1.window.count == 0


# --- fusion and quantisation -----------------------------------------------------------------------------------


def train_both(policy: str) -> tuple[Net, Net]:
    model, plain = make_converted(policy), make_plain()
    for window in windows():
        for x in window:
            model(x)
        commit(model)
        plain(torch.cat(window))
    return model.eval(), plain.eval()


@every_policy
def test_a_convolution_takes_in_its_layer(policy: str) -> None:
    model, plain = train_both(policy)
    x = draw(4, 99)
    fused = fuse_conv_bn_eval(model.conv1, model.bn1)
    torch.testing.assert_close(fused(x), plain.bn1(plain.conv1(x)))


@SCRIPTED  # at import
@every_policy
def test_fuse_of_fx_leaves_converted_layers_and_takes_in_reverted_ones(policy: str) -> None:
    from torch.fx.experimental.optimization import fuse

    model, plain = train_both(policy)
    x = draw(4, 99)
    for reverted in (False, True):
        fused = fuse(revert_sync_accum(copy.deepcopy(model)) if reverted else model)
        torch.testing.assert_close(fused(x), plain(x))
        assert sum(node.op == "call_module" for node in fused.graph.nodes) == (2 if reverted else 4)


@QUANTIZED
@every_policy
def test_fuse_modules_refuses_until_reverted(policy: str) -> None:
    # Here, and not above: it may leave torch for a package of its own, as it warns.
    from torch.ao.quantization import fuse_modules

    model, plain = train_both(policy)
    pairs = [["conv1", "bn1"], ["conv2", "bn2"]]
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*SyncAccumBatchNorm2d"):
        fuse_modules(model, pairs)
    fused = fuse_modules(revert_sync_accum(copy.deepcopy(model)), pairs)
    x = draw(4, 99)
    torch.testing.assert_close(fused(x), plain(x))


@QUANTIZED
@every_policy
def test_prepare_qat_trains_a_reverted_model(policy: str) -> None:
    from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat

    seen = []
    for m in train_both(policy):
        net = revert_sync_accum(m).float().train()
        fuse_modules_qat(net, [["conv1", "bn1"], ["conv2", "bn2"]], inplace=True)
        net.qconfig = get_default_qat_qconfig("fbgemm")
        prepare_qat(net, inplace=True)
        y = net(draw(4, 99).float())
        y.square().sum().backward()
        seen.append([y, *(p.grad for p in net.parameters()), *(b for b in net.buffers() if b.is_floating_point())])
    torch.testing.assert_close(*seen)


# --- replicas, functions, transforms ---------------------------------------------------------------------------


def replicate(model: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes it on each GPU: new modules, with the attributes of the old ones."""
    replica = model._replicate_for_data_parallel()
    for name, child in model._modules.items():
        setattr(replica, name, replicate(child))
    for name, parameter in model._parameters.items():
        setattr(replica, name, parameter.clone())
    replica._buffers = {name: buffer.clone() for name, buffer in model._buffers.items()}
    return replica


@every_policy
def test_replicas_of_data_parallel_share_their_layers_windows(policy: str) -> None:
    """nn.DataParallel itself needs GPUs; its replicas run here as it runs them: in threads."""
    model, plain = make_converted(policy), make_plain()
    for window in windows():
        threads = [threading.Thread(target=replicate(model), args=(x,)) for x in window]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert commit(model).values["bn1"] == sum(map(len, window)) * 9
        plain(torch.cat(window))
        assert_same_layers(model, plain)


@every_policy
@pytest.mark.parametrize("given", ["parameters", "all"])
def test_functional_call_with_the_models_own_buffers_accumulates(policy: str, given: str) -> None:
    model = make_converted(policy)

    def call(x: Tensor) -> Tensor:
        state = dict(model.named_parameters()) | (dict(model.named_buffers()) if given == "all" else {})
        return functional_call(model, state, (x,))

    assert_trains(policy, model, call)


@every_policy
@pytest.mark.parametrize("momentum", [0.1, None])
def test_functional_call_updates_other_buffers_that_it_is_given(policy: str, momentum: float | None) -> None:
    model, plain = make_converted(policy), make_plain()
    for layer in (model.bn1, model.bn2, plain.bn1, plain.bn2):
        layer.momentum = momentum
    for m in (model, plain):
        m(draw(3, 5))
    commit(model)
    model(draw(2, 6))
    before = copy.deepcopy(model.state_dict())
    window = model.bn1.window.pack()
    ours, theirs = ({k: v.detach().clone() + 1 for k, v in m.named_buffers()} for m in (model, plain))
    with pytest.warns(UserWarning, match=r"layer bn1 has .*functional_call gave it.*the parameters alone") as said:
        functional_call(model, ours, (draw(3, 0),))
    assert len(said) == 1
    for seed in (1, 2):
        functional_call(model, ours, (draw(3, seed),))
    for seed in range(3):
        functional_call(plain, theirs, (draw(3, seed),))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(model.bn1.window.pack(), window)


def test_functional_call_with_other_buffers_normalises_with_these() -> None:
    model = make_converted("running")
    given = {name: buffer + 1 for name, buffer in model.named_buffers()}
    x = draw(3, 0)
    expected = functional_call(make_plain().eval(), given, (x,))
    with pytest.warns(UserWarning, match="functional_call gave it"):
        torch.testing.assert_close(functional_call(model, given, (x,)), expected)


# One operator refuses for all policies but "window", which has its own; to compile them all takes long.
@pytest.mark.parametrize(
    ("compiled", "policy"),
    [("function", "renorm"), ("function", "window"), ("function of a copy", "running"), ("model", "renorm")],
)
def test_other_buffers_are_refused_in_compiled_code(policy: str, compiled: str) -> None:
    torch._dynamo.reset()
    model: Any = make_converted(policy)
    if compiled == "function of a copy":
        model = copy.deepcopy(model)
    if compiled == "model":
        model = torch.compile(model, backend="eager", fullgraph=True)

    def call(buffers: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(model, buffers, (x,))

    if compiled != "model":
        call = torch.compile(call, backend="eager", fullgraph=True)
    own, x = dict(model.named_buffers()), draw(4, 0)
    call(own, x)
    with pytest.raises(RuntimeError, match="layer bn1 other running statistics in compiled code"):
        call({name: buffer.clone() for name, buffer in own.items()}, x)
    assert commit(model).values == {"bn1": 36, "bn2": 36}


def test_other_buffers_are_refused_where_micro_batches_run_together() -> None:
    model = make_converted("renorm")
    given = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(syncaccum.LockstepError, match="layer bn1 other running statistics"):
        syncaccum.lockstep(model, lambda x: functional_call(model, given, (x,)), [draw(2, 0), draw(2, 1)])


@every_policy
def test_buffers_that_were_replaced_are_the_layers_own(policy: str) -> None:
    """As load_state_dict(assign=True), or a tool that puts buffers of its own in their place."""
    model, plain = make_converted(policy), make_plain()
    model.load_state_dict(plain.state_dict(), assign=True)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        model.bn2._buffers[name] = plain.bn2.get_buffer(name).clone()
    model.bn2(model.conv2(draw(3, 0)))
    x = draw(3, 1)
    functional_call(model, dict(model.named_parameters()) | dict(model.named_buffers()), (x,))
    assert commit(model).values == {"bn1": 27, "bn2": 54}


@every_policy
def test_func_grad_is_autograds_and_counts_once(policy: str) -> None:
    model, plain = make_trained(policy, seed=5)
    x = draw(3, 0)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(dict(model.named_parameters()))
    assert commit(model).values == {"bn1": 27, "bn2": 27}
    plain(x)
    assert_same_layers(model, plain)
    twin = make_converted(policy)
    twin(draw(3, 5))
    commit(twin)
    with syncaccum.not_counted(twin):  # a transform has no books, so nothing is paid back
        twin(x).square().sum().backward()
    torch.testing.assert_close(gradients, {name: p.grad for name, p in twin.named_parameters()})


@every_policy
def test_vmap_is_refused_in_training_and_batch_norms_in_eval(policy: str) -> None:
    model, plain = make_converted(policy), make_plain()
    xs = torch.stack([draw(3, 0), draw(3, 1)])
    with pytest.raises(RuntimeError, match=r"under torch\.vmap would be a micro-batch for each example.* in eval mode"):
        torch.vmap(model)(xs)
    assert model.bn1.window.count == 0
    torch.testing.assert_close(torch.vmap(model.eval())(xs), torch.vmap(plain.eval())(xs))
