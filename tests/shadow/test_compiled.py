"""EMAOptimizer.compile: the graphs it makes, what they compute, and when the step stays eager."""

import copy
import pickle
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from reference import Reference, same, through_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.optim import LBFGS, SGD, Adafactor, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from ema_optim import EMAOptimizer, equal_average, warmup_decay

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own compiler warns at import
    import torch._inductor.compile_fx
    from torch._inductor.utils import run_and_get_code

INNERS = {
    "AdamW": lambda params: AdamW(params, lr=0.01),
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.01, amsgrad=True, weight_decay=0.1),
}


class Graphs(list):
    """A backend that needs no C++ compiler: it keeps the graphs and runs them as they are."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph.forward


class Problem:
    """Weights with the same gradients for everyone who has the seed."""

    def __init__(self, make, decay=0.9, shapes=((32, 4), (64,), ()), **options):
        self.random = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(self._draw(shape)) for shape in shapes]
        self.optimizer = EMAOptimizer(make(self.params), decay, **options)

    def _draw(self, shape):
        return torch.randn(shape, generator=self.random)

    def step(self, steps=1):
        for _ in range(steps):
            for p in self.params:
                p.grad = self._draw(p.shape).to(p.dtype)
            self.optimizer.step()
        return self

    def compile(self):
        self.graphs = Graphs()
        self.optimizer.compile(backend=self.graphs)
        return self

    def emas(self):
        return [self.optimizer.state[p]["ema"] for p in self.params]

    def tensors(self):
        return [*(p.detach() for p in self.params), *self.emas()]


def assert_close(compiled, eager):
    # The compiled Adam takes 1 - beta**t in single precision, the eager one in double.
    for mine, other in zip(compiled.tensors(), eager.tensors(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def assert_same(left, right):
    assert all(map(same, left.tensors(), right.tensors()))


def pair(make=INNERS["AdamW"], *args, **options):
    return Problem(make, *args, **options).compile(), Problem(make, *args, **options)


@pytest.mark.parametrize("name", INNERS)
def test_changing_rate_and_decay_make_one_graph_and_the_eager_numbers(name):
    compiled, eager = pair(INNERS[name], warmup_decay(0.99))
    for problem in (compiled, eager):
        schedule = LambdaLR(problem.optimizer, lambda step: 0.8**step)
        for _ in range(8):
            problem.step()
            schedule.step()
    assert_close(compiled, eager)
    assert len(compiled.graphs) == 1
    assert compiled.optimizer.param_groups[0]["lr"] == eager.optimizer.param_groups[0]["lr"]


class Replayed(Graphs):
    """Keeps of each input of a graph what dynamo knows of its address."""

    def __call__(self, graph, inputs, mode=None, options=None):
        known = [node.meta.get("tensor_dict", {}) for node in graph.graph.nodes]
        self.append([tensor.get("_dynamo_static_input_type") for tensor in known])
        return graph.forward


# Inductor makes no CUDA graph where a tensor that is written to may lie elsewhere the next time.
@pytest.mark.parametrize(
    ("how", "marked"),
    [
        ({"mode": "reduce-overhead"}, 3),
        ({"mode": "max-autotune"}, 3),
        ({"options": {"triton.cudagraphs": True}}, 3),
        ({"mode": "default"}, 0),
    ],
    ids=str,
)
def test_ema_tensors_have_static_addresses_where_graphs_are_replayed(how, marked):
    replayed, eager = Problem(INNERS["AdamW"]), Problem(INNERS["AdamW"])
    replayed.optimizer.compile(backend=(graphs := Replayed()), **how)
    assert_close(replayed.step(4), eager.step(4))
    assert [known.count("unguarded") for known in graphs] == [marked]
    saved = through_file(replayed.optimizer.state_dict())
    assert same(saved["state"], replayed.optimizer.state_dict()["state"])


def test_every_window_is_averaged_in_the_one_graph():
    compiled, eager = pair(INNERS["SGD"], {"short": 0.25, "long": 0.5})
    for problem in (compiled, eager):
        problem.step(6)
    model = torch.nn.ParameterList
    for name in ("short", "long"):
        emas = [p.optimizer.get_ema_state(model(p.params), decay=name) for p in (compiled, eager)]
        torch.testing.assert_close(*emas, rtol=1e-4, atol=1e-5)
    nodes = [node for graph in compiled.graphs for node in graph.graph.nodes]
    assert len([node for node in nodes if "lerp" in node.name]) == 2 * len(eager.params)


def test_first_step_is_the_eager_one():
    compiled, eager = pair()
    assert_same(compiled.step(), eager.step())
    assert not compiled.graphs


def test_a_step_without_a_gradient_averages_and_makes_no_graph():
    compiled, eager = pair()
    for problem in (compiled, eager):
        problem.step(2).optimizer.zero_grad()
        problem.optimizer.step()
    assert_close(compiled, eager)
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize(("every", "after"), [(3, 0), (1, 3), (2, 2)])
def test_steps_with_and_without_an_update_are_two_graphs(every, after):
    compiled, eager = pair(update_every=every, update_after_step=after)
    assert_close(compiled.step(12), eager.step(12))
    assert len(compiled.graphs) == 2


def test_rates_and_decays_of_groups_are_their_own():
    def grouped(params):
        return SGD([{"params": params[:1], "lr": 0.1, "ema_decay": 0.5}, {"params": params[1:]}])

    compiled, eager = pair(grouped, 0.99)
    for step in range(1, 7):
        for problem in (compiled, eager):
            problem.optimizer.param_groups[0]["ema_decay"] = 1 / (step + 1)
        assert_close(compiled.step(), eager.step())
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_decay_one_keeps_the_ema_whatever_the_weights_are(value):
    compiled = Problem(INNERS["SGD"], 1.0).compile().step(3)
    before = [ema.clone() for ema in compiled.emas()]
    with torch.no_grad():
        compiled.params[0].fill_(value)
    compiled.step(2)
    assert all(map(same, compiled.emas(), before))
    assert len(compiled.graphs) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_decay_zero_copies_the_weights_whatever_the_ema_is(value):
    compiled = Problem(INNERS["SGD"], 0.0).compile().step(3)
    compiled.emas()[0].fill_(value)
    compiled.step()
    weights = [p.detach() for p in compiled.params]
    assert all(map(same, compiled.emas(), weights))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_reach_the_ema_as_in_eager_mode(value):
    compiled, eager = (problem.step(3) for problem in pair(INNERS["SGD"]))
    with torch.no_grad():
        compiled.params[0][0], eager.params[0][0] = value, value
    assert_close(compiled.step(2), eager.step(2))


def test_a_large_step_of_the_average_is_as_accurate_as_in_eager_mode():
    # Averages of 1/t: from a weight of one half on, lerp is written from the other end.
    compiled, eager = pair(INNERS["SGD"], equal_average())
    assert_close(compiled.step(6), eager.step(6))


def test_every_torch_optimizer_that_can_be_traced_is():
    names = ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
    for name in names:
        compiled, eager = pair(getattr(torch.optim, name))
        assert_close(compiled.step(4), eager.step(4))
        assert len(compiled.graphs) == 1, name


def test_momentum_that_changes_with_the_rate_is_traced_twice():
    compiled, eager = pair()
    for problem in (compiled, eager):
        schedule = OneCycleLR(problem.optimizer, 0.1, total_steps=12)
        for _ in range(10):
            problem.step()
            schedule.step()
    assert_close(compiled, eager)
    assert len(compiled.graphs) == 2


def test_a_rate_that_is_a_tensor_stays_the_users_tensor():
    rate = torch.tensor(0.1)
    compiled, eager = pair(lambda params: SGD(params, lr=rate.clone()))
    rate = compiled.optimizer.param_groups[0]["lr"]
    schedules = [CosineAnnealingLR(problem.optimizer, 8) for problem in (compiled, eager)]
    for _ in range(5):
        assert_close(compiled.step(), eager.step())
        for schedule in schedules:
            schedule.step()
    assert compiled.optimizer.param_groups[0]["lr"] is rate
    assert len(compiled.graphs) == 1


def saved(problem, path):
    torch.save(problem.optimizer.state_dict(), path)
    return torch.load(path, weights_only=True)


def test_checkpoint_has_the_eager_keys_and_kinds(tmp_path):
    def kinds(tree):
        if not isinstance(tree, (dict, list)):
            return type(tree), getattr(tree, "dtype", None)
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: kinds(value) for key, value in items}

    left, right = (saved(problem.step(4), tmp_path / "file") for problem in pair())
    assert kinds(left) == kinds(right)


@pytest.mark.parametrize("name", INNERS)
def test_resumed_run_is_bit_equal_to_the_uninterrupted_one(name, tmp_path):
    whole, resumed = Problem(INNERS[name]).compile().step(3), Problem(INNERS[name]).compile()
    resumed.optimizer.load_state_dict(saved(whole, tmp_path / "file"))
    for mine, other in zip(resumed.params, whole.params, strict=True):
        mine.data.copy_(other)
    resumed.random.set_state(whole.random.get_state())
    assert_same(whole.step(3), resumed.step(3))
    assert len(whole.graphs) == len(resumed.graphs) == 1


def test_a_load_traces_at_most_once_more(tmp_path):
    compiled, eager = pair()
    for problem in (compiled, eager):
        state_dict = saved(problem.step(3), tmp_path / "file")
        problem.step(2).optimizer.load_state_dict(state_dict)
        problem.step(4)
    assert_close(compiled, eager)
    assert len(compiled.graphs) <= 2


def test_swaps_and_metrics_are_as_in_eager_mode():
    compiled, eager = pair(INNERS["SGD"])
    for problem in (compiled.step(30), eager.step(30)):
        with problem.optimizer.swap_ema_weights():
            problem.swapped = [p.detach().clone() for p in problem.params]
    assert all(map(same, compiled.swapped, compiled.emas()))
    metrics = compiled.optimizer.ema_metrics()
    assert metrics == pytest.approx(eager.optimizer.ema_metrics(), rel=1e-5)
    assert_close(compiled.step(2), eager.step(2))
    assert len(compiled.graphs) == 1


def test_an_added_group_and_a_late_gradient_are_traced_once_more():
    compiled, eager = pair(INNERS["SGD"])
    for problem in (compiled, eager):
        new = torch.nn.Parameter(problem._draw((5,)))
        problem.step(3).optimizer.add_param_group({"params": [new], "lr": 0.01})
        problem.step(2).params.append(new)
        problem.step(3)
    assert_close(compiled, eager)
    assert len(compiled.graphs) == 3


def closure_of(problem):
    target = problem._draw(())

    def closure():
        problem.optimizer.zero_grad()
        loss = sum((p - target).square().sum() for p in problem.params)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("name", INNERS)
def test_a_closure_is_evaluated_before_the_graph_and_its_loss_returned(name):
    compiled, eager = pair(INNERS[name])
    for _ in range(4):
        losses = [problem.optimizer.step(closure_of(problem)) for problem in (compiled, eager)]
        torch.testing.assert_close(*losses)
    assert_close(compiled, eager)
    assert len(compiled.graphs) == 1


def test_hooks_of_the_wrapper_run_around_the_graph():
    compiled = Problem(INNERS["SGD"]).compile().step(2)
    seen = []
    compiled.optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    compiled.optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    compiled.step(2)
    assert seen == ["pre", "post"] * 2
    assert len(compiled.graphs) == 1


def test_a_skipped_step_of_a_grad_scaler_is_no_step():
    compiled = Problem(INNERS["SGD"]).compile().step(3)
    scaler = torch.amp.GradScaler("cpu")
    before = [tensor.clone() for tensor in compiled.tensors()]
    (scaler.scale(compiled.params[1].sum()) * torch.inf).backward()
    scaler.step(compiled.optimizer)
    assert all(map(same, compiled.tensors(), before))
    assert compiled.optimizer.ema_metrics()["ema_updates"] == 3


class Foreign(torch.optim.Optimizer):
    """Someone's optimizer: looks at its gradients, and evaluates its closure last."""

    def __init__(self, params, looks=True):
        super().__init__(params, {"lr": 0.1})
        self.looks = looks

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if self.looks and p.grad.norm() > 1:
                p.grad.div_(p.grad.norm())
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        with torch.enable_grad():
            return None if closure is None else closure()


def hooked(params):
    inner = SGD(params, lr=0.1)
    inner.register_step_post_hook(lambda *args: params[0].data.clamp_(-1, 1))
    return inner


def scheduled(params):
    inner = SGD(params, lr=0.1)
    inner.schedule = LambdaLR(inner, lambda step: 0.8**step)
    return inner


def complex_(params):
    params[0] = torch.nn.Parameter(params[0].detach() + 1j)
    return SGD(params, lr=0.1)


EAGER = {
    "fused": (lambda params: AdamW(params, fused=True), "without fused=True"),
    "foreach": (lambda params: AdamW(params, foreach=True), "leave it out"),
    "hook": (hooked, "step hooks are registered"),
    "patched": (scheduled, "build schedulers with the EMAOptimizer"),
    "complex": (complex_, "complex"),
}


@pytest.mark.parametrize("name", EAGER)
def test_what_cannot_be_compiled_is_told_at_once_and_runs_as_before(name):
    make, reason = EAGER[name]
    compiled, eager = Problem(make), Problem(make)
    with pytest.warns(UserWarning, match=reason) as caught:
        compiled.compile()
    assert_same(compiled.step(4), eager.step(4))
    assert len(caught) == 1
    assert not compiled.graphs


def test_a_differentiable_step_is_not_compiled():
    differentiable = Problem(lambda params: SGD(params, lr=0.1, differentiable=True))
    with pytest.warns(UserWarning, match="records the step for autograd"):
        differentiable.compile()


@pytest.mark.parametrize("make", [Adafactor, Foreign])
def test_a_step_that_cannot_be_traced_is_told_and_runs_as_before(make):
    compiled, eager = pair(make)
    with pytest.warns(UserWarning, match="could not be compiled") as caught:
        compiled.step(4)
    assert_same(compiled, eager.step(4))
    assert len(caught) == 1


def test_a_closure_of_someone_elses_optimizer_is_left_to_it():
    compiled, eager = pair(lambda params: Foreign(params, looks=False))
    with pytest.warns(UserWarning, match="with a closure is unknown"):
        losses = [p.step(3).optimizer.step(closure_of(p)) for p in (compiled, eager)]
    torch.testing.assert_close(*losses)
    assert_close(compiled, eager)
    assert len(compiled.graphs) == 1


def test_lbfgs_runs_as_before():
    compiled, eager = Problem(LBFGS), Problem(LBFGS)
    with pytest.warns(UserWarning, match="closure several times"):
        compiled.compile()
    for problem in (compiled, eager):
        problem.optimizer.step(closure_of(problem))
    assert_same(compiled, eager)


def test_sparse_gradients_run_as_before():
    table = torch.nn.Embedding(8, 4, sparse=True)
    optimizer = EMAOptimizer(SGD(table.parameters(), lr=0.1), 0.9)
    optimizer.compile(backend=(graphs := Graphs()))
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.warns(UserWarning, match="a gradient is sparse"):
        optimizer.step()
    optimizer.step()
    torch.testing.assert_close(table.weight[1].detach(), before[1] - 0.2)
    torch.testing.assert_close(optimizer.state[table.weight]["ema"][1], before[1] - 0.029)
    assert not graphs


@pytest.mark.parametrize("register", [register_optimizer_step_post_hook, None])
def test_a_hook_that_comes_and_goes_is_honoured(register):
    compiled = Problem(INNERS["SGD"]).compile().step(2)
    seen = []
    register = register or compiled.optimizer.inner.register_step_post_hook
    handle = register(lambda *args: seen.append(len(compiled.graphs)))
    with pytest.warns(UserWarning, match="step hooks are registered"):
        compiled.step(2)
    handle.remove()
    compiled.step()
    assert seen == [1, 1]
    assert len(compiled.graphs) == 1


def failing(graph, inputs):
    raise RuntimeError("no compiler")


def test_a_compiler_that_fails_is_told_and_the_step_made_once():
    compiled, eager = Problem(INNERS["AdamW"]), Problem(INNERS["AdamW"])
    compiled.optimizer.compile(backend=failing)
    with pytest.warns(UserWarning, match="AdamW could not be compiled .*no compiler") as caught:
        compiled.step(4)
    assert_same(compiled, eager.step(4))
    assert len(caught) == 1


def test_each_optimizer_has_a_limit_of_its_own():
    for size in range(torch._dynamo.config.recompile_limit + 2):
        compiled = Problem(INNERS["SGD"], shapes=((size + 2,),)).compile().step(3)
        assert len(compiled.graphs) == 1


def test_more_graphs_than_the_limit_end_in_eager_mode():
    compiled, eager = pair(INNERS["SGD"])
    group = compiled.optimizer.param_groups[0]
    for number in range(limit := torch._dynamo.config.recompile_limit):
        group["tag"] = str(number)
        compiled.step(2)
    group["tag"] = "one more"
    with pytest.warns(UserWarning, match=r"could not be compiled .*recompile limit"):
        compiled.step(2)
    assert_close(compiled, eager.step(2 * limit + 2))
    assert len(compiled.graphs) == limit


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_is_not_compiled_and_goes_on(duplicate):
    compiled = Problem(INNERS["SGD"]).compile().step(3)
    compiled.optimizer = duplicate(compiled.optimizer)
    compiled.params = compiled.optimizer.param_groups[0]["params"]
    eager = Problem(INNERS["SGD"])
    assert_close(compiled.step(3), eager.step(6))
    assert len(compiled.graphs) == 1


def test_fullgraph_is_not_an_option():
    with pytest.raises(TypeError, match="fullgraph"):
        Problem(INNERS["SGD"]).optimizer.compile(fullgraph=False)


def test_import_leaves_the_compiler_alone():
    code = "import sys, torch; before = set(sys.modules); import ema_optim; "
    code += "print([n for n in set(sys.modules) - before if 'dynamo' in n or 'inductor' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_run_as_before(mesh):
    compiled, eager = (Problem(INNERS["AdamW"], shapes=((4, 4),)) for _ in range(2))
    for problem in (compiled, eager):
        problem.params = [torch.nn.Parameter(distribute_tensor(problem.params[0].data, mesh))]
        problem.optimizer = EMAOptimizer(AdamW(problem.params, foreach=False), 0.9)
    with pytest.warns(UserWarning, match="spread over ranks"):
        compiled.compile()
    for _ in range(3):
        for problem in (compiled, eager):
            problem.params[0].grad = distribute_tensor(problem._draw((4, 4)), mesh)
            problem.optimizer.step()
    assert all(map(torch.equal, compiled.tensors(), eager.tensors()))
    assert not compiled.graphs


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler is at hand"
)


def code_of_step(problem):
    _, (code,) = run_and_get_code(problem.step)
    return code


def counts(code):
    """Kernels, loops, loads and stores of vectors."""
    patterns = (r"async_compile\.cpp", r"\bfor *\(", r"::loadu\(", r"\.store\(")
    return [len(re.findall(pattern, code)) for pattern in patterns]


@needs_compiler
def test_the_ema_is_a_load_and_a_store_in_the_loops_of_the_one_kernel():
    shapes = ((64, 16), (128,))
    ours, bare = (Problem(INNERS["AdamW"], shapes=shapes, update_every=k) for k in (1, 2))
    for problem in (ours, bare):
        problem.step(2).optimizer.compile()
    ours, bare = (counts(code_of_step(problem)) for problem in (ours, bare))
    assert ours[:2] == bare[:2] == [1, 2]  # a loop for each shape
    assert ours[2:] == [bare[2] + 2, bare[3] + 2]


@needs_compiler
@pytest.mark.parametrize("name", INNERS)
def test_what_the_compiler_makes_of_it_computes_the_eager_numbers(name):
    compiled, eager = (Problem(INNERS[name], warmup_decay(0.99)) for _ in range(2))
    compiled.optimizer.compile()
    for problem in (compiled, eager):
        schedule = LambdaLR(problem.optimizer, lambda step: 0.8**step)
        for _ in range(8):
            problem.step()
            schedule.step()
    assert_close(compiled, eager)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_narrow_weights_is_that_of_the_rounded_weights(dtype):
    compiled = Problem(lambda params: SGD(params, lr=0.1))
    for p in compiled.params:
        p.data = p.data.to(dtype)
    compiled.optimizer.compile()
    reference = Reference(compiled.params, 0.9)
    for _ in range(4):
        compiled.step()
        reference.update()
    for ema, expected in zip(compiled.emas(), reference.emas, strict=True):
        torch.testing.assert_close(ema.double(), expected, rtol=1e-6, atol=1e-6)
