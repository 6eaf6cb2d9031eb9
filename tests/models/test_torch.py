"""The torch adapter: the contract of every adapter over many modules, then what is torch's own."""

import gc
import subprocess
import sys
import weakref
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
import torch as pt
from torch import nn
from torch.nn import functional

from polyfed.core.algorithm import Env, Fit, Predict
from polyfed.core.checks_model import MODEL_CHECKS, Case, check_model, fresh, nudged
from polyfed.core.errors import DataError, SpecError, UsageError
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Distill, Near, Own
from polyfed.core.tree import Tree
from polyfed.models import torch_model, torch_optimizers
from polyfed.models.torch import SGD, Adam, AdamW, torch
from polyfed.models.torch_resident import Resident

THREE = Problem(("a", "b", "c"), 3)
TWO = Problem(("no", "yes"), 2)
VALUE = Problem(None, 1)
VALUES = Problem(None, 2)


def rows_of(problem, *shape, n=37, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *(shape or (6,)))).astype(np.float32)
    score = x.reshape(n, -1)[:, :3]
    if problem.is_classification:
        return Rows({"x": x}, score[:, : problem.outputs].argmax(1).astype(np.int64))
    return Rows({"x": x}, score[:, : problem.outputs].reshape(-1 if problem.outputs == 1 else (n, 2)).copy())


def env_of(problem, **changes):
    return replace(Env(seed=1, problem=problem, client="north", number=1), **changes)


def seeded(make):
    def build():
        with pt.random.fork_rng():
            pt.manual_seed(5)
            return make()

    return build


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3))


class Convolutions(nn.Module):
    def __init__(self, flatten="reshape"):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 16, 3)
        self.flatten = flatten

    def forward(self, x):
        x = functional.relu(self.norm(self.conv(x)))
        return self.head(x.view(len(x), -1) if self.flatten == "view" else x.flatten(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.dense = nn.Embedding(9, 4), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, word, dense):
        return self.head(self.words(word) + self.dense(dense))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.shared = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return {"own": self.own(x), "shared": self.shared(x)}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(pt.tanh(self.a(x))))


class Assigned(nn.Module):
    """Assigns its buffer instead of writing into it, and has a counter that no one averages."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.register_buffer("seen", pt.zeros((), dtype=pt.int64))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + len(x)
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.norm, self.head = nn.GRU(2, 4, batch_first=True), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.cell(x.reshape(len(x), 3, 2))[0][:, -1]))


def reparametrised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3))


def two_input_rows():
    rng = np.random.default_rng(3)
    words, dense = rng.integers(0, 9, 30), rng.normal(size=(30, 6))
    return Rows({"dense": dense, "word": words}, (words % 3).astype(np.int64))


def own_loop(training):
    velocity = {name: pt.zeros_like(p) for name, p in training.parameters.items()}
    for batch in training.batches():
        training.loss(batch).backward()
        with pt.no_grad():
            for name, p in training.parameters.items():
                velocity[name] = 0.5 * velocity[name] + p.grad
                p -= training.lr * velocity[name]
                p.grad = None


def cases():
    yield "mlp", torch(mlp, batch_size=9), rows_of(THREE), THREE
    yield "module in order", torch(seeded(mlp)(), shuffle=False, batch_size=12), rows_of(THREE), THREE
    yield "adam", torch(mlp, optimizer="adam", lr=0.01), rows_of(THREE), THREE
    yield (
        "momentum kept",
        torch(mlp, optimizer=SGD(0.9, 0.01, nesterov=True), keep_optimizer=True),
        rows_of(THREE),
        THREE,
    )
    yield "images", torch(Convolutions, batch_size=8), rows_of(THREE, 2, 4, 4), THREE
    yield "images by view", torch(lambda: Convolutions("view"), batch_size=8), rows_of(THREE, 2, 4, 4), THREE
    yield "one logit", torch(lambda: nn.Linear(6, 1), loss="bce"), rows_of(TWO), TWO
    yield "one logit by default", torch(lambda: nn.Linear(6, 1)), rows_of(TWO), TWO
    yield "value", torch(lambda: nn.Linear(6, 1)), rows_of(VALUE), VALUE
    yield "values", torch(lambda: nn.Linear(6, 2), loss="huber", clip_norm=1.0), rows_of(VALUES), VALUES
    yield "two inputs", torch(TwoInputs, batch_size=10), two_input_rows(), THREE
    yield "float64", torch(lambda: nn.Linear(6, 3).double()), rows_of(THREE), THREE
    yield "bfloat16", torch(lambda: nn.Linear(6, 3).bfloat16(), lr=0.5), rows_of(THREE), THREE
    yield "recurrent", torch(Recurrent, batch_size=8), rows_of(THREE), THREE
    yield "reparametrised", torch(reparametrised, batch_size=8), rows_of(THREE), THREE
    yield "tied", torch(Tied, batch_size=8), rows_of(THREE), THREE
    yield "assigned buffer", torch(Assigned), rows_of(THREE), THREE
    yield "own loop", torch(mlp, train=own_loop), rows_of(THREE), THREE
    yield "own loss", torch(lambda: nn.Linear(6, 1), loss=nn.MSELoss()), rows_of(VALUE), VALUE
    yield "steps", torch(mlp, steps=3), rows_of(THREE), THREE
    yield (
        "shared and personal",
        torch(
            shared=lambda: nn.Linear(6, 5),
            personal=nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)),
            optimizer={"shared": "sgd", "personal": AdamW()},
            lr={"shared": 0.1, "personal": 0.01},
        ),
        rows_of(THREE),
        THREE,
    )


def predicted(module, rows):
    inputs = {name: pt.tensor(a, dtype=None if a.dtype.kind == "i" else pt.float32) for name, a in rows.inputs.items()}
    dtype = next(module.parameters()).dtype
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with pt.no_grad():
        out = module(**inputs) if len(inputs) > 1 else module(*inputs.values())
    return out.float().numpy()


def called(module, rows, problem):
    out = predicted(module, rows)
    return np.concatenate([0 * out, out], 1) if problem is TWO else out


with pt.random.fork_rng():  # one of the cases holds a module, not a factory
    pt.manual_seed(0)
    CASES = list(cases())


@pytest.mark.parametrize("check", MODEL_CHECKS)
@pytest.mark.parametrize(("model", "rows", "problem"), [pytest.param(*c[1:], id=c[0]) for c in CASES])
def test_contract_holds(check, model, rows, problem):
    call = None if model.resident.float_dtype == pt.bfloat16 else (lambda e, r: called(e, r, problem))
    MODEL_CHECKS[check](Case(model, rows, env_of(problem), call))


# ---------------------------------------------------------------- mutants: the contract's checks can fail
def leaves_generator(monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def seeded_for_good(seed, device):
        pt.manual_seed(seed)
        yield

    monkeypatch.setattr(torch_model, "seeded", seeded_for_good)


def draws_from_the_process(monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def unseeded(seed, device):
        with pt.random.fork_rng():
            yield

    monkeypatch.setattr(torch_model, "seeded", unseeded)


def forgets_the_part(monkeypatch):
    monkeypatch.setattr(Resident, "_frozen", lambda self, part: [])
    monkeypatch.setattr(Tree, "under", lambda self, part: self)


def ignores_start(monkeypatch):
    monkeypatch.setattr(torch_model.TorchModel, "_load", lambda self, start, env: self.resident.load(self._first(env)))


def keeps_views(monkeypatch):
    def save(self):
        return Tree.wrap(self.spec, self._host)

    monkeypatch.setattr(Resident, "save", save)


def views_the_rows(monkeypatch):
    def view(array, device, dtype):
        array.flags.writeable = True
        return pt.from_numpy(array) if array.dtype == np.float32 else pt.tensor(array, dtype=dtype)

    monkeypatch.setattr(torch_model, "copied", view)


def predicts_in_training(monkeypatch):
    kept = Resident.mode
    monkeypatch.setattr(Resident, "mode", lambda self, *, training, part=(): kept(self, training=True))


def exports_itself(monkeypatch):
    monkeypatch.setattr(Resident, "export", lambda self, state: self.module)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (leaves_generator, "global_generators_stay"),
        (draws_from_the_process, "global_generators_stay"),
        (forgets_the_part, "part_moves_only_itself"),
        (ignores_start, "start_is_laid_over"),
        (keeps_views, "fit_is_a_function"),
        (views_the_rows, "inputs_are_untouched"),
        (predicts_in_training, "predict_is_a_function"),
        (exports_itself, "exports_predict_alike"),
    ],
)
def test_check_when_the_adapter_breaks_its_promise_fails(monkeypatch, mutant, check):
    model, rows = torch(seeded(mlp), batch_size=9), rows_of(THREE)
    MODEL_CHECKS[check](Case(model, rows, env_of(THREE), predicted))
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        MODEL_CHECKS[check](Case(torch(seeded(mlp), batch_size=9), rows, env_of(THREE), predicted))


# ---------------------------------------------------------------- training is torch's own
def plain_loop(module, rows, optimizer, *, batch, epochs=1):
    """The loop that a user would write, in stored order."""
    module.train()
    x, y = pt.tensor(rows.x), pt.tensor(rows.target)
    for _ in range(epochs):
        for i in range(0, len(rows), batch):
            optimizer.zero_grad()
            functional.cross_entropy(module(x[i : i + batch]), y[i : i + batch]).backward()
            optimizer.step()
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


OPTIMIZERS = {
    "sgd": (SGD(), lambda p: pt.optim.SGD(p, lr=0.05)),
    "decay": (SGD(weight_decay=0.1), lambda p: pt.optim.SGD(p, lr=0.05, weight_decay=0.1)),
    "momentum": (SGD(0.9), lambda p: pt.optim.SGD(p, lr=0.05, momentum=0.9)),
    "nesterov": (
        SGD(0.9, 0.01, nesterov=True),
        lambda p: pt.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    ),
    "adam": (Adam(), lambda p: pt.optim.Adam(p, lr=0.05)),
    "adam decay": (Adam((0.8, 0.9), 1e-6, 0.1), lambda p: pt.optim.Adam(p, 0.05, (0.8, 0.9), 1e-6, 0.1)),
    "adamw": (AdamW(weight_decay=0.1), lambda p: pt.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # what torch._dynamo's import says
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_when_compared_with_torch_optim_is_equal(name):
    ours, theirs = OPTIMIZERS[name]
    rows, module = rows_of(THREE), seeded(net)()
    fitted = torch(module, optimizer=ours, lr=0.05, batch_size=10, shuffle=False, epochs=3).fit(
        Fit(), rows, env_of(THREE)
    )
    wanted = plain_loop(module, rows, theirs(list(module.parameters())), batch=10, epochs=3)
    assert fitted.steps == 12
    for entry, array in wanted.items():
        np.testing.assert_allclose(fitted.state[entry], array, atol=1e-6, rtol=0)
        if name == "sgd":
            assert fitted.state[entry].tobytes() == array.tobytes(), "plain SGD has the very bits of torch.optim.SGD"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # what torch._dynamo's import says
def test_fit_when_the_optimizer_is_the_users_own_is_that_of_torch_optim():
    module, rows = seeded(net)(), rows_of(THREE)
    model = torch(module, optimizer=lambda p: pt.optim.RMSprop(p, lr=0.01), batch_size=10, shuffle=False)
    fitted = model.fit(Fit(), rows, env_of(THREE))
    wanted = plain_loop(module, rows, pt.optim.RMSprop(module.parameters(), lr=0.01), batch=10)
    for entry, array in wanted.items():
        np.testing.assert_allclose(fitted.state[entry], array, atol=1e-7, rtol=0)
    assert "sgd" not in model.offers
    check_model(model, rows, env_of(THREE), call=predicted)


def test_fit_reports_the_mean_training_loss_over_rows():
    module, rows = seeded(net)(), rows_of(THREE)
    with pt.no_grad():
        wanted = functional.cross_entropy(module(pt.tensor(rows.x)), pt.tensor(rows.target)).item()
    fitted = torch(module, lr=0.0, batch_size=10).fit(Fit(), rows, env_of(THREE))
    assert fitted.metrics["loss"] == pytest.approx(wanted, rel=1e-6)
    assert fitted.lr == 0.0


def test_gradients_when_compared_with_autograd_are_equal():
    module = seeded(net)()
    unused = nn.Parameter(pt.ones(2))
    params = (*module.parameters(), unused)

    def loss():
        return module(pt.ones(4, 6)).square().mean()

    ours, theirs = torch_optimizers.gradients(loss(), params), pt.autograd.grad(loss(), params, allow_unused=True)
    assert ours[-1] is None
    assert all(pt.equal(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True))
    assert torch_optimizers.gradients(pt.ones(()), params) == [None] * len(params)


def test_clip_when_compared_with_torch_is_equal():
    grads = [pt.randn(4, 3, generator=pt.Generator().manual_seed(1)), None, pt.ones(2)]
    params = [nn.Parameter(pt.zeros(4, 3)), nn.Parameter(pt.zeros(2))]
    params[0].grad, params[1].grad = grads[0].clone(), grads[2].clone()
    nn.utils.clip_grad_norm_(params, 0.7)
    torch_optimizers.clip(grads, 0.7)
    assert pt.allclose(grads[0], params[0].grad)
    assert pt.allclose(grads[2], params[1].grad)
    torch_optimizers.clip([None], 0.7)


def test_optimizer_when_a_parameter_has_no_gradient_leaves_it_and_its_memory():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x)

    for optimizer in ("sgd", SGD(0.9), "adam", "adamw"):
        model = torch(Half, optimizer=optimizer, keep_optimizer=True)
        first, fitted = model.first(rows_of(THREE), env_of(THREE)), model.fit(Fit(), rows_of(THREE), env_of(THREE))
        moved = {name for name in first if first[name].tobytes() != fitted.state[name].tobytes()}
        assert moved
        assert not [name for name in moved if "idle" in name]


def test_keep_optimizer_when_two_fits_follow_each_other_is_one_fit_of_twice_the_epochs():
    rows, env = rows_of(THREE), env_of(THREE)
    for optimizer in (SGD(0.9), "adam"):
        model = torch(seeded(net), optimizer=optimizer, keep_optimizer=True, shuffle=False)
        half = model.fit(Fit(epochs=1), rows, env).state
        assert model.fit(Fit(start=(half,), epochs=1), rows, env).state == model.fit(Fit(epochs=2), rows, env).state
        kept = "steps" if optimizer == "adam" else "momentum"
        assert f"buffers:0.weight/{kept}" in half
        new = torch(seeded(net), optimizer=optimizer, shuffle=False)
        again = new.fit(Fit(start=(half.part("params"),), epochs=1), rows, env).state
        assert again.part("params") != model.fit(Fit(epochs=2), rows, env).state.part("params")


# ---------------------------------------------------------------- states
def test_state_names_parts_by_the_type_of_the_module_that_holds_them():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.downsample = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
            self.register_buffer("running_mean", pt.zeros(3))

        def forward(self, x):
            return self.downsample(x)

    state = torch(Odd).first(rows_of(THREE), env_of(THREE))
    assert list(state) == [
        "downsample.0.weight",
        "downsample.0.bias",
        "downsample.1.weight",
        "downsample.1.bias",
        "stats:downsample.1/mean",
        "stats:downsample.1/variance",
        "buffers:running_mean",
        "buffers:downsample.1.num_batches_tracked",
    ]
    assert state["buffers:downsample.1.num_batches_tracked"].dtype == np.int64


def test_fit_when_the_module_normalises_moves_its_statistics_as_torch_does():
    module, rows = seeded(mlp)(), rows_of(THREE)
    fitted = torch(module, batch_size=10, shuffle=False, lr=0.0).fit(Fit(), rows, env_of(THREE))
    module.train()
    for i in range(0, 37, 10):
        module(pt.tensor(rows.x[i : i + 10]))
    np.testing.assert_array_equal(fitted.state["stats:1/mean"], module[1].running_mean.numpy())
    np.testing.assert_array_equal(fitted.state["stats:1/variance"], module[1].running_var.numpy())
    assert fitted.state["buffers:1.num_batches_tracked"] == 4


def test_fit_of_a_part_keeps_statistics_of_frozen_layers_and_their_dropout_off():
    def build():
        base = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        return nn.Sequential(base, nn.Linear(6, 3))

    model = torch(build)
    env, rows = env_of(THREE), rows_of(THREE)
    first, after = model.first(rows, env), model.fit(Fit(part=("1",)), rows, env).state
    assert after.under(("0",)) == first.under(("0",))
    assert after.under(("1",)) != first.under(("1",))
    training = {name: module.training for name, module in model.resident.module.named_modules()}
    assert training == {"": True, "0": False, "0.0": False, "0.1": False, "0.2": False, "1": True}


def test_tied_parameters_appear_once_and_stay_tied():
    model = torch(Tied)
    fitted = model.fit(Fit(), rows_of(THREE), env_of(THREE))
    assert "b.weight" not in fitted.state
    exported = model.export(fitted.state, rows_of(THREE), env_of(THREE))
    assert exported.b.weight is exported.a.weight


def test_parameters_that_the_user_froze_never_move():
    module = seeded(net)()
    module[0].weight.requires_grad_(False)
    fitted = torch(module, optimizer=AdamW()).fit(Fit(), rows_of(THREE), env_of(THREE))
    np.testing.assert_array_equal(fitted.state["0.weight"], module[0].weight.numpy())


def test_module_when_wrapped_is_copied_and_its_weights_are_the_start():
    module = seeded(net)()
    model = torch(module)
    kept = module[0].weight.detach().clone()
    model.fit(Fit(), rows_of(THREE), env_of(THREE))
    assert pt.equal(module[0].weight, kept)
    with pt.no_grad():
        module[0].weight.zero_()
    np.testing.assert_array_equal(model.first(rows_of(THREE), env_of(THREE))["0.weight"], kept.numpy())
    assert not torch(module).first(rows_of(THREE), env_of(THREE))["0.weight"].any(), "wrapped again: as it is then"


def test_factory_draws_its_start_from_the_runs_seed_alone():
    rows = rows_of(THREE)
    model = torch(net)
    one = model.first(rows, env_of(THREE, client="north"))
    assert torch(net).first(rows, env_of(THREE, client="south")) is one, "a thousand clients hold one tree"
    assert model.first(rows, env_of(THREE, seed=2)) != one
    assert model.first(rows, env_of(THREE)) == one


def test_models_of_one_factory_hold_one_resident_module():
    assert torch(net).resident is torch(net, lr=0.5, epochs=3).resident
    assert torch(net).key == torch(net).key
    other = lambda: net()  # noqa: E731  # another function object is the point
    assert torch(net).resident is not torch(other).resident
    assert torch(net).key != torch(other).key
    assert torch(net, key="net").resident is torch(other, key="net").resident
    assert torch(net, key="net").key != torch(mlp, key="net").key
    module = seeded(mlp)()
    one = torch(module)
    assert torch(module).resident is one.resident
    module[3].p = 0.9
    assert torch(module).resident is not one.resident, "another dropout is another architecture"


def test_equal_specs_when_the_forward_differs_never_share_a_resident_module():
    first, second = (torch(lambda act=act: nn.Sequential(nn.Linear(6, 3), act())) for act in (nn.ReLU, nn.Tanh))
    assert first.resident.spec == second.resident.spec
    assert first.key != second.key
    rows, env = rows_of(THREE), env_of(THREE)
    assert not np.array_equal(first.predict(Predict(), rows, env), second.predict(Predict(), rows, env))


def test_resident_module_when_its_last_model_goes_is_freed():
    model = torch(lambda: net())
    watched = weakref.ref(model.resident)
    del model
    gc.collect()
    assert watched() is None


def test_clients_that_take_turns_do_not_disturb_each_other():
    rows, others = rows_of(THREE), rows_of(THREE, seed=9)
    one, two = torch(mlp, batch_size=9), torch(mlp, batch_size=4, lr=0.5)
    alone = one.fit(Fit(), rows, env_of(THREE)).state
    two.fit(Fit(), others, env_of(THREE, client="south"))
    assert one.fit(Fit(), rows, env_of(THREE)).state == alone


def test_model_when_sent_to_another_process_works_the_same():
    rows, env = rows_of(THREE), env_of(THREE)
    for model in (
        torch(seeded(mlp)()),
        torch(lambda: mlp()),
        torch(shared=nn.Linear(6, 4), personal=lambda: nn.Linear(4, 3)),
    ):
        data = cloudpickle.dumps([model, model])
        wanted = model.fit(Fit(), rows, env).state
        one, two = cloudpickle.loads(data)
        assert one.fit(Fit(), rows, env).state == wanted
        assert two.key == model.key
        assert one.resident is model.resident, "in one process it is one architecture"


def test_model_when_loaded_by_a_fresh_process_gives_the_same_bits(tmp_path):
    rows, env = rows_of(THREE), env_of(THREE)
    model = torch(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)), batch_size=9)
    (tmp_path / "job").write_bytes(cloudpickle.dumps((model, rows, env)))
    program = (
        "import sys, cloudpickle; from polyfed.core.algorithm import Fit\n"
        "model, rows, env = cloudpickle.load(open(sys.argv[1], 'rb'))\n"
        "print(model.fit(Fit(), rows, env).state.digest, 'torch._dynamo' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program, tmp_path / "job"], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [model.fit(Fit(), rows, env).state.digest, "False"]


def test_export_shares_no_memory_with_the_resident_module():
    model, rows, env = torch(mlp), rows_of(THREE), env_of(THREE)
    state = model.fit(Fit(), rows, env).state
    exported = model.export(state, rows, env)
    assert not exported.training
    held = {t.untyped_storage().data_ptr() for t in (*exported.parameters(), *exported.buffers())}
    assert not held & {flat.untyped_storage().data_ptr() for flat in model.resident.flat.values()}
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in (*exported.parameters(), *exported.buffers()))
    with pt.no_grad():
        exported[0].weight.zero_()
    assert model.fit(Fit(), rows, env).state == state


# ---------------------------------------------------------------- batches
def sizes_of(module, n, batch, **options):
    seen = []

    def loop(training):
        for data in training.batches():
            seen.append(len(data))
            training.loss(data)

    torch(module, batch_size=batch, train=loop, **options).fit(Fit(), rows_of(THREE, n=n), env_of(THREE))
    return seen


def test_batches_when_the_last_is_incomplete_use_it():
    assert sizes_of(net, 25, 10) == [10, 10, 5]
    assert sizes_of(net, 21, 10) == [10, 10, 1]
    assert sizes_of(net, 5, 10, epochs=2) == [5, 5]


def test_batches_when_one_row_is_left_over_for_batch_normalisation_join_it_to_the_one_before():
    assert sizes_of(mlp, 21, 10) == [10, 11]
    assert sizes_of(mlp, 11, 10) == [11]
    assert sizes_of(mlp, 20, 10) == [10, 10]


@pytest.mark.parametrize(("n", "batch"), [(1, 10), (5, 1)])
def test_fit_when_batch_normalisation_has_one_row_at_a_time_is_refused(n, batch):
    with pytest.raises(DataError, match=rf"one row has no spread; it has {n} training rows? and batch_size={batch}"):
        torch(mlp, batch_size=batch).fit(Fit(), rows_of(THREE, n=n), env_of(THREE))


def test_batches_when_shuffled_hold_each_row_once_an_epoch_in_another_order_with_its_own_targets():
    seen = []

    def loop(training):
        seen.extend((batch.inputs["x"], batch.target, batch.targets["teacher"]) for batch in training.batches())

    rows = rows_of(THREE, n=20)
    teacher = np.arange(20, dtype=np.float32)
    asked = Fit(targets={"teacher": teacher}, epochs=2)
    torch(net, batch_size=6, train=loop).fit(asked, rows, env_of(THREE))
    x, y, tags = (pt.cat(column).numpy() for column in zip(*seen, strict=True))
    orders = tags.astype(int).reshape(2, 20)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert list(orders[0]) != list(orders[1])
    np.testing.assert_array_equal(x, rows.x[orders.ravel()])
    np.testing.assert_array_equal(y, rows.target[orders.ravel()])


def test_fit_when_another_task_of_the_client_begins_draws_another_order():
    model, rows = torch(net, batch_size=5), rows_of(THREE)
    one, two = (model.fit(Fit(), rows, env_of(THREE, number=number)).state for number in (1, 2))
    assert one != two


def test_train_hook_when_it_is_the_plain_loop_is_the_plain_fit():
    def loop(training):
        assert isinstance(training.rng.random(), float)
        for batch in training.batches():
            grads = pt.autograd.grad(training.loss(batch), list(training.parameters.values()))
            with pt.no_grad():
                for p, g in zip(training.parameters.values(), grads, strict=True):
                    p.add_(g, alpha=-training.lr)

    rows, env = rows_of(THREE), env_of(THREE)
    anchor = nudged(torch(net).first(rows, env)).part("params")
    for asked in (Fit(), Fit(part=("2",)), Fit(steps=5), Fit(terms=(Own(), Near(0.1)), tensors={"anchor": anchor})):
        ours, hooked = (torch(net, batch_size=9, train=hook).fit(asked, rows, env) for hook in (None, loop))
        assert ours.state == hooked.state
        assert (ours.steps, ours.metrics) == (hooked.steps, hooked.metrics)


def test_train_hook_when_it_raises_leaves_the_model_usable():
    def loop(training):
        next(iter(training.batches()))
        raise ZeroDivisionError

    rows, env = rows_of(THREE), env_of(THREE)
    with pytest.raises(ZeroDivisionError):
        torch(net, train=loop).fit(Fit(part=("2",)), rows, env)
    assert all(p.requires_grad for p in torch(net).resident.params.values())


# ---------------------------------------------------------------- outputs, inputs, formats
def test_predict_when_the_module_has_one_logit_gives_two():
    model, rows, env = torch(lambda: nn.Linear(6, 1), loss="bce"), rows_of(TWO), env_of(TWO)
    found = model.predict(Predict(), rows, env)
    assert not found[:, 0].any()
    flat = torch(lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), loss="bce")
    np.testing.assert_array_equal(found, flat.predict(Predict(start=(_renamed(model, rows, env),)), rows, env))


def _renamed(model, rows, env):
    first = model.first(rows, env)
    return Tree({f"0.{name}": array for name, array in first.items()})


def test_loss_bce_when_the_module_has_one_logit_is_cross_entropy_of_two():
    rows, env = rows_of(TWO), env_of(TWO)
    one, two = (torch(lambda: nn.Linear(6, 1), loss=loss, key="logit").fit(Fit(), rows, env) for loss in ("bce", None))
    np.testing.assert_allclose(one.state.flat, two.state.flat, atol=1e-6)


def test_named_outputs_reach_terms_and_one_of_them_predicts():
    rows, env = rows_of(THREE), env_of(THREE)

    def both(ops, step):
        assert step.outputs["own"].shape == step.outputs["shared"].shape == (37, 3)
        return step.loss("own") + step.loss("shared")

    by_default, own = torch(Named, batch_size=64), torch(Named, batch_size=64, output="own")
    module = by_default.export(by_default.first(rows, env), rows, env)
    np.testing.assert_allclose(by_default.predict(Predict(), rows, env), predicted(module.shared, rows), atol=1e-6)
    np.testing.assert_allclose(own.predict(Predict(), rows, env), predicted(module.own, rows), atol=1e-6)
    first = by_default.first(rows, env)
    moved = by_default.fit(Fit(terms=(both,)), rows, env).state
    assert all(first[name].tobytes() != moved[name].tobytes() for name in first)
    only = by_default.fit(Fit(), rows, env).state
    assert only.under(("own",)) == first.under(("own",)), "the own loss is that of the prediction"
    with pytest.raises(UsageError, match="no output 'other'; it has own, shared"):
        torch(Named, output="other").first(rows, env)


def test_features_are_what_the_last_linear_layer_takes_or_what_is_named():
    rows, env = rows_of(THREE), env_of(THREE)
    ask = Predict(what="features")
    model = torch(net)
    module = model.export(model.first(rows, env), rows, env)
    np.testing.assert_allclose(model.predict(ask, rows, env), predicted(module[:2], rows), atol=1e-6)
    named = torch(net, features="0")
    np.testing.assert_allclose(named.predict(ask, rows, env), predicted(module[0], rows), atol=1e-6)
    two = torch(shared=nn.Linear(6, 4), personal=nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
    assert two.predict(ask, rows, env).shape == (37, 4)
    assert "features" not in torch(lambda: nn.Sequential(nn.Conv1d(1, 3, 6), nn.Flatten())).offers
    assert not module[2]._forward_pre_hooks
    with pytest.raises(UsageError, match="no submodule 'neck'"):
        torch(net, features="neck")


def test_features_reach_a_term_of_ones_own():
    def pull(ops, step):
        return step.mean(ops.sum(ops.square(step.features), -1))

    model, rows, env = torch(net, lr=0.01), rows_of(THREE), env_of(THREE)
    ask = Predict(what="features")
    after = model.fit(Fit(terms=(pull,), epochs=5), rows, env).state
    small = model.predict(Predict(start=(after,), what="features"), rows, env)
    assert np.square(small).sum() < np.square(model.predict(ask, rows, env)).sum()


def test_inputs_when_several_go_by_name_or_as_one_dict():
    class Dict(TwoInputs):
        def forward(self, inputs):
            return super().forward(**inputs)

    rows, env = two_input_rows(), env_of(THREE)
    by_name, as_dict = torch(seeded(TwoInputs)()), torch(seeded(Dict)())
    np.testing.assert_array_equal(by_name.predict(Predict(), rows, env), as_dict.predict(Predict(), rows, env))
    shared = torch(shared=TwoInputs, personal=lambda: nn.Linear(3, 3))
    assert shared.predict(Predict(), rows, env).shape == (30, 3)


def test_predict_when_rows_come_with_others_gives_the_same_bits_in_whole_batches():
    model, env = torch(net), env_of(THREE)
    many = rows_of(THREE, n=600)
    head = many.take(np.arange(256))
    np.testing.assert_array_equal(model.predict(Predict(), many, env)[:256], model.predict(Predict(), head, env))
    assert model.predict(Predict(), many.take(np.arange(0)), env).shape == (0, 3)


def test_images_are_held_in_channels_last_when_the_model_can():
    rows, env = rows_of(THREE, 2, 4, 4), env_of(THREE)
    model, by_view = torch(Convolutions), torch(lambda: Convolutions("view"))
    for each in (model, by_view):
        each.first(rows, env)
    assert model.resident.channels_last
    assert model.resident.params["conv.weight"].is_contiguous(memory_format=pt.channels_last)
    assert not by_view.resident.channels_last
    plain = torch(Convolutions, memory_format="contiguous", key="plain")
    one, two = (each.fit(Fit(), rows, env).state for each in (model, plain))
    for name in one.part("params"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-6)
    exported = model.export(one, rows, env)
    assert exported.conv.weight.is_contiguous()
    np.testing.assert_array_equal(exported.conv.weight.detach().numpy(), one["conv.weight"])


def test_images_of_a_wrong_size_do_not_change_the_memory_format():
    model, env = torch(lambda: Convolutions()), env_of(THREE)
    with pytest.raises(DataError):
        model.first(rows_of(THREE, 2, 5, 5), env)
    assert model.resident.channels_last


def test_torch_when_the_adapter_is_used_runs_one_thread_a_call():
    torch(net)
    assert pt.get_num_threads() == 1


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch("mlp"), "module is a str"),
        (lambda: torch(), "module is missing"),
        (lambda: torch(shared=nn.Linear(2, 2)), "personal is missing"),
        (lambda: torch(nn.Linear(2, 2), shared=nn.Linear(2, 2)), "not both"),
        (lambda: torch(lambda: 3), "made a int"),
        (lambda: torch(nn.ReLU()), "no parameters to train"),
        (lambda: torch(nn.LazyLinear(3)), "has no size yet"),
        (lambda: torch(net, optimizer="sdg"), "expected one of sgd, adam, adamw"),
        (lambda: torch(net, optimizer=3), "optimizer is a int"),
        (lambda: torch(net, lr=-1.0), "lr is -1.0"),
        (lambda: torch(net, lr="fast"), "lr is 'fast'"),
        (lambda: torch(net, loss="ce"), "loss is 'ce'"),
        (lambda: torch(net, epochs=1.5), "epochs is 1.5"),
        (lambda: torch(net, batch_size=0), "batch_size is 0"),
        (lambda: torch(net, clip_norm=0.0), "clip_norm is 0.0"),
        (lambda: torch(net, memory_format="nhwc"), "memory_format is 'nhwc'"),
        (lambda: torch(net, optimizer={"0": "sgd"}), "no optimizer for the parameter '2.weight'"),
        (lambda: torch(net, optimizer={"0": "sgd", "": "adam"}, lr={"0": 0.1}), "must name the same prefixes"),
        (lambda: torch(net, optimizer=lambda p: p, keep_optimizer=True), "keep_optimizer=True needs"),
        (lambda: torch(net, train=own_loop, keep_optimizer=True), "no effect on a loop of your own"),
    ],
)
def test_torch_when_an_argument_cannot_be_used_says_what_to_write(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_torch_when_a_parameter_has_a_reserved_name_is_refused():
    module = nn.Linear(2, 2)
    module.register_parameter("stats:x", nn.Parameter(pt.ones(1)))
    with pytest.raises(UsageError, match="may not be named 'stats:x'"):
        torch(module)


@pytest.mark.parametrize("use", ["first", "fit", "predict"])
def test_rows_when_they_are_too_wide_are_refused_with_layer_and_sizes(use):
    model, rows, env = torch(net), rows_of(THREE, 7), env_of(THREE)
    with pytest.raises(DataError, match=r"layer '0' \(Linear\) takes 6 inputs, got 7"):
        {
            "first": lambda: model.first(rows, env),
            "fit": lambda: model.fit(Fit(), rows, env),
            "predict": lambda: model.predict(Predict(), rows, env),
        }[use]()


def test_rows_when_an_index_is_beyond_the_embedding_are_refused_with_the_layer():
    rows = two_input_rows()
    rows.inputs["word"][0] = 99
    with pytest.raises(DataError, match=r"in layer 'words' \(Embedding\)"):
        torch(lambda: TwoInputs()).first(rows, env_of(THREE))


def test_module_when_its_outputs_are_not_the_problems_is_refused_before_training():
    with pytest.raises(UsageError, match="Linear gives 3 outputs, the problem has 2 classes"):
        torch(lambda: nn.Linear(6, 3)).fit(Fit(), rows_of(TWO), env_of(TWO))
    with pytest.raises(UsageError, match="returns a tuple"):
        torch(lambda: nn.LSTM(6, 3)).first(rows_of(THREE), env_of(THREE))


@pytest.mark.parametrize(
    ("rows", "problem", "message"),
    [
        (Rows({"x": np.zeros((4, 6), np.float32)}, np.array([0, 1, 2, 5])), THREE, "classes 0 to 5, expected 0 to 2"),
        (Rows({"x": np.zeros((4, 6), np.float32)}, np.zeros(4, np.float32)), THREE, "expected \\(n,\\) class numbers"),
        (Rows({"x": np.zeros((4, 6), np.float32)}, np.zeros((4, 3), np.float32)), VALUES, "expected \\(4, 2\\)"),
        (Rows({"x": np.array([["a"] * 6] * 4)}, np.zeros(4, np.int64)), THREE, "takes numbers; encode it before"),
        (Rows({"x": np.zeros((0, 6), np.float32)}, np.zeros(0, np.int64)), THREE, "no rows to train on"),
    ],
)
def test_rows_when_they_cannot_be_learnt_from_are_refused(rows, problem, message):
    with pytest.raises(DataError, match=message):
        torch(lambda: nn.Linear(6, problem.outputs)).fit(Fit(), rows, env_of(problem))


def test_fit_when_the_request_does_not_suit_the_model_is_refused():
    model, rows, env = torch(net), rows_of(THREE), env_of(THREE)
    with pytest.raises(UsageError, match="no parameters to train under head; it has 0, 2"):
        model.fit(Fit(part=("head",)), rows, env)
    with pytest.raises(SpecError, match="head"):
        model.fit(Fit(start=(Tree({"head": np.zeros(3, np.float32)}),)), rows, env)
    with pytest.raises(DataError, match="'teacher' has 5 entries for 37 rows"):
        model.fit(Fit(terms=(Distill(),), targets={"teacher": np.ones((5, 3), np.float32)}), rows, env)
    with pytest.raises(UsageError, match="needs labelled rows"):
        model.fit(Fit(), rows.unlabelled(), env)
    with pytest.raises(UsageError, match="loss 'mse' is not one of cross_entropy, bce"):
        torch(net, loss="mse").fit(Fit(), rows, env)
    with pytest.raises(UsageError, match="two classes, the problem has 3"):
        torch(net, loss="bce").fit(Fit(), rows, env)


def test_rows_when_read_only_or_float64_are_taken_without_a_warning():
    rows = fresh(rows_of(THREE))
    wide = Rows({"x": rows.x.astype(np.float64)}, rows.target)
    model, env = torch(net), env_of(THREE)
    assert model.fit(Fit(), rows, env).state == model.fit(Fit(), wide, env).state


def test_loss_when_it_is_not_one_number_is_refused():
    loss = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(UsageError, match=r"has shape \(32,\), expected one number"):
        torch(net, loss=loss).fit(Fit(), rows_of(THREE), env_of(THREE))


def test_rows_are_held_on_a_64_byte_boundary_once():
    model, rows = torch(net), rows_of(THREE)
    held = model.inputs(rows, THREE)["x"]
    assert held.data_ptr() % 64 == 0
    assert not np.shares_memory(held.numpy(), rows.x)
    assert model.inputs(rows, THREE)["x"] is held
    assert torch(net, lr=0.5).inputs(rows, THREE)["x"] is held
    assert all(flat.data_ptr() % 64 == 0 for flat in model.resident.flat.values())


def test_settings_say_how_each_prefix_is_trained():
    model = torch(net, optimizer={"0": "sgd", "": Adam()}, loss=nn.CrossEntropyLoss(), steps=4, clip_norm=2.0)
    assert dict(model.settings) == {
        "loss": "CrossEntropyLoss",
        "optimizer (0)": "SGD(momentum=0.0, weight_decay=0.0, nesterov=False)",
        "lr (0)": 0.05,
        "optimizer": "Adam(betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0)",
        "lr": 0.001,
        "steps": 4,
        "batch_size": 32,
        "shuffle": True,
        "device": "cpu",
        "clip_norm": 2.0,
    }
    assert repr(model) == "pf.torch(Sequential)"
