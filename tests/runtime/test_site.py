import copy
import io
import pickle

import pytest
import torch
from torch import nn

from harmony_lightning.runtime.site import Interposition, Site


def names_of(root):
    return {id(parameter): name for name, parameter in root.named_parameters()}


def site_of(module):
    return Site(module, "layer", "layer", 0, names_of(module), module._call_impl)


def doubled(module):
    return {name: 2 * parameter.detach() for name, parameter in module.named_parameters()}


def buffers_of(site):
    return [owner._buffers[name].clone() for owner, name in site.buffer_places]


class Root(nn.Module):
    """Layers `a` and `c` (with modules inside), a module with buffers alone, glue in `b`."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.ModuleDict({"c": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm1d(2))})
        self.scaler = nn.BatchNorm1d(2, affine=False)
        self.act = nn.Tanh()

    def forward(self, x):
        return self.act(self.scaler(self.b["c"](self.a(x))))


def install(root, dispatch):
    interposition = Interposition(root)
    names = names_of(root)
    layers = {"a": ("a.weight", "a.bias"), "b.c": tuple(n for n in names.values() if n.startswith("b.c"))}
    interposition.install({"a": 0, "b.c": 1}, layers, names, dispatch)
    return interposition


def compiled_calls(root):
    return [module._compiled_call_impl for module in root.modules()]


@pytest.fixture
def calls():
    return []


@pytest.fixture
def noting(calls):
    def dispatch(site, /, *args, **kwargs):
        calls.append(site.name)
        return site.call(*args, **kwargs)

    return dispatch


# --- the seam ------------------------------------------------------------------------------------------------------------


def test_calls_of_layers_and_modules_within_them_are_dispatched(noting, calls):
    root = Root()
    interposition = install(root, noting)
    root(torch.randn(4, 2))
    assert calls == ["a", "b.c", "b.c.0", "b.c.2", "scaler"]
    sites = {site.name: (site.layer, site.pack) for site in interposition.sites.values()}
    assert sites == {
        "a": ("a", 0),
        "b.c": ("b.c", 1),
        "b.c.0": ("b.c", 1),
        "b.c.2": ("b.c", 1),
        "scaler": ("scaler", None),
    }


def test_results_are_those_without_a_seam(noting):
    root, x = Root().eval(), torch.randn(4, 2)
    expected = root(x)
    install(root, noting)
    assert torch.equal(root(x), expected)


def test_calls_are_given_back_in_full(noting, calls):
    root = Root()
    root.a._compiled_call_impl = compiled = lambda x: calls.append("compiled") or x
    before = compiled_calls(root)
    interposition = install(root, noting)
    assert compiled_calls(root) != before
    root.a(torch.ones(1, 2))
    assert calls == ["a", "compiled"]
    interposition.remove()
    assert compiled_calls(root) == before
    assert root.a._compiled_call_impl is compiled
    assert interposition.sites == {}
    interposition.remove()
    assert compiled_calls(root) == before


def test_installing_again_does_not_pile_up(noting, calls):
    root = Root()
    before = compiled_calls(root)
    interposition = install(root, noting)
    interposition.install({"a": 0}, {"a": ("a.weight", "a.bias")}, names_of(root), noting)
    root(torch.randn(4, 2))
    # What belongs to no layer now but has weights is glue.
    assert calls == ["a", "scaler"]
    interposition.remove()
    assert compiled_calls(root) == before


def test_a_module_in_two_places_is_one_site(noting, calls):
    shared = nn.Linear(2, 2)
    root = nn.Sequential(shared, shared)
    interposition = Interposition(root)
    interposition.install({"0": 0}, {"0": ("0.weight", "0.bias")}, names_of(root), noting)
    root(torch.randn(1, 2))
    assert calls == ["0", "0"]
    interposition.remove()
    assert compiled_calls(root) == [None, None]


def saved(root):
    file = io.BytesIO()
    torch.save(root, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda root: pickle.loads(pickle.dumps(root)), saved])
def test_copies_leave_the_seam_behind(noting, calls, duplicate):
    root = Root()
    interposition = install(root, noting)
    twin = duplicate(root)
    assert compiled_calls(twin) == [None] * len(list(twin.modules()))
    twin(torch.randn(4, 2))
    assert calls == []
    root(torch.randn(4, 2))
    assert calls
    interposition.remove()


def test_the_user_s_hooks_run_inside_the_seam(noting, calls):
    root = Root()
    root.a.register_forward_pre_hook(lambda module, args: calls.append("before"))
    root.a.register_forward_hook(lambda module, args, result: calls.append("behind") or 2 * result)
    expected = root.a(torch.ones(1, 2))
    calls.clear()
    install(root, noting)
    assert torch.equal(root.a(torch.ones(1, 2)), expected)
    assert calls == ["a", "before", "behind"]


def test_hooks_on_modules_within_a_layer_are_noticed_while_they_are_there():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    site = site_of(module)
    module.register_forward_hook(lambda *_: None)
    assert not site.has_hooks_inside()
    handle = module[1].register_forward_hook(lambda *_: None)
    assert site.has_hooks_inside()
    handle.remove()
    assert not site.has_hooks_inside()


# --- running on other weights ------------------------------------------------------------------------------------------


def test_a_layer_runs_on_the_weights_that_are_hung_in():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    own = dict(layer.named_parameters())
    result = site_of(layer).run(doubled(layer), [], (x,), {})
    assert torch.equal(result, nn.functional.linear(x, 2 * layer.weight, 2 * layer.bias))
    assert all(layer._parameters[name] is parameter for name, parameter in own.items())


def test_tied_weights_hang_in_all_their_places():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    site = site_of(module)
    assert site.weight_names == ("0.weight",)
    identity = torch.eye(2)
    assert torch.equal(site.run({"0.weight": 3 * identity}, [], (identity,), {}), 9 * identity)
    assert module[0].weight is module[1].weight


def test_everything_hangs_back_after_an_error():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.memory = nn.LSTM(2, 2)

        def forward(self, x):
            self.norm.running_mean = torch.ones(2)
            raise ValueError("in user code")

    module = Failing()
    site = site_of(module)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    flat = module.memory._flat_weights
    with pytest.raises(ValueError, match="in user code"):
        site.run(doubled(module), buffers_of(site), (torch.ones(1),), {})
    now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert all(now[name] is tensor for name, tensor in own.items())
    assert module.memory._flat_weights is flat


def test_a_missing_weight_leaves_nothing_behind():
    layer = nn.Linear(2, 2)
    own = layer.weight
    with pytest.raises(KeyError):
        site_of(layer).run({"weight": torch.zeros(2, 2)}, [], (torch.ones(1, 2),), {})
    assert layer.weight is own


def test_written_buffers_are_the_given_ones():
    norm = nn.BatchNorm1d(2)
    site = site_of(norm)
    assert [name for _, name in site.buffer_places] == ["running_mean", "running_var", "num_batches_tracked"]
    buffers = buffers_of(site)
    held = list(buffers)
    site.run(doubled(norm), buffers, (torch.randn(8, 2) + 5,), {})
    assert buffers[0] is held[0]
    assert buffers[0].min() > 0.3
    assert norm.running_mean.tolist() == [0, 0]
    assert int(norm.num_batches_tracked) == 0


def test_a_buffer_that_is_replaced_is_handed_out():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return x

    module = Counting()
    buffers = [torch.full((), 4.0)]
    site_of(module).run({}, buffers, (torch.ones(1),), {})
    assert buffers[0].item() == 5
    assert module.calls.item() == 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_run_on_the_weights_that_are_hung_in(kind):
    module, x = kind(3, 4, num_layers=2), torch.randn(5, 1, 3)
    with torch.no_grad():
        twin = copy.deepcopy(module)
        for parameter in twin.parameters():
            parameter.mul_(2)
    flat = module._flat_weights
    plain = module(x)[0]
    result = site_of(module).run(doubled(module), [], (x,), {})[0]
    assert torch.equal(result, twin(x)[0])
    assert module._flat_weights is flat
    assert torch.equal(module(x)[0], plain)


def test_training_flags_are_those_of_the_owners_of_buffers():
    module = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1), nn.BatchNorm1d(1))
    module[2].eval()
    assert site_of(module).training_flags() == (True,) * 3 + (False,) * 3
