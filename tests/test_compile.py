"""torch.compile: of layers where the device allows it, of the whole module never, and either way the numbers hold."""

import pytest
import torch
from chain import WIDTH, Chain, harmony, loader, same_weights, trainer, twins
from torch import nn
from torch._C._dynamo import eval_frame
from torch._dynamo.testing import CompileCounterWithBackend

from harmony_lightning import HarmonyStrategy, UnsupportedError

BACKENDS = ["eager", "aot_eager"]  # need no C++ compiler


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fit_compiled(strategy, compile_module, backend):
    """Fit one module that `compile_module` has changed and one that is as it was; returns them and the counter."""
    ours, reference = twins()
    counter = CompileCounterWithBackend(backend)
    compiled = compile_module(ours, counter)
    trainer().fit(reference, loader(8))
    trainer(strategy).fit(compiled if compiled is not None else ours, loader(8))
    return ours, reference, counter


def compile_blocks(module, backend):
    for block in module.net:
        block.compile(backend=backend)


def compile_whole(module, backend):
    return torch.compile(module, backend=backend)


def compile_glue(module, backend):
    loss = torch.compile(nn.functional.mse_loss, backend=backend)
    module.step = lambda batch: loss(module.head(module.net(batch[0])).squeeze(1), batch[1])


def told(caplog, text):
    return sum(text in record.message for record in caplog.records)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_layers_train_to_the_same_weights(backend, caplog):
    ours, reference, counter = fit_compiled(HarmonyStrategy(microbatch_size=8), compile_blocks, backend)
    assert same_weights(ours, reference)
    assert counter.frame_count > 0
    assert all(block._compiled_call_impl is not None for block in ours.net)
    assert not told(caplog, "eagerly")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_layers_run_eagerly_on_emulated_gpus_with_one_warning(backend, caplog):
    ours, reference, counter = fit_compiled(harmony(microbatch_size=8), compile_blocks, backend)
    assert same_weights(ours, reference)
    assert counter.frame_count == 0
    assert told(caplog, "compiled modules run eagerly on emulated GPUs") == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [lambda: HarmonyStrategy(microbatch_size=8), lambda: harmony(microbatch_size=8)])
def test_a_compiled_module_runs_eagerly_with_one_warning(backend, make, caplog):
    ours, reference, counter = fit_compiled(make(), compile_whole, backend)
    assert same_weights(ours, reference)
    assert counter.frame_count == 0
    assert told(caplog, "torch.compile of the whole module is passed over") == 1


@pytest.mark.parametrize("make", [lambda: HarmonyStrategy(microbatch_size=8), lambda: harmony(microbatch_size=8)])
def test_compiled_functions_between_layers(make):
    ours, reference, _ = fit_compiled(make(), compile_glue, "aot_eager")
    assert same_weights(ours, reference)


def test_a_compiled_module_evaluates_and_predicts():
    ours, reference = twins()
    compiled = torch.compile(ours, backend="eager")
    fitted, plain = trainer(harmony()), trainer()
    assert fitted.validate(compiled, loader(8), verbose=False) == plain.validate(reference, loader(8), verbose=False)
    mine, theirs = trainer(harmony()).predict(compiled, loader(8)), plain.predict(reference, loader(8))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_compiled_module_around_several_packs_leaves_the_compiler_off():
    """Its microbatches are parked in the middle of it; what runs meanwhile, and after `fit`, must not be compiled."""
    ours, reference = twins()
    ours.net = torch.compile(ours.net, backend="eager")
    trainer().fit(reference, loader(8))
    trainer(harmony(microbatch_size=2, one_layer_per_pack=True)).fit(ours, loader(8))
    assert eval_frame.get_eval_frame_callback() is None
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_microbatches_through_compiled_layers():
    """Several microbatches, whose last is smaller: other shapes reach the compiled code."""
    ours, reference = twins(optimizer=torch.optim.SGD)
    compile_blocks(ours, "aot_eager")
    trainer(limit_train_batches=2).fit(reference, loader(7))
    trainer(HarmonyStrategy(microbatch_size=3), limit_train_batches=2).fit(ours, loader(7))
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


class Scripted(Chain):
    """The first block is TorchScript."""

    def __init__(self, make, trains):
        super().__init__(depth=3)
        self.net[0] = make(self.net[0].requires_grad_(trains))


def script(module):
    return torch.jit.script(module)


def traced(module):
    return torch.jit.trace(module, torch.zeros(2, WIDTH))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [script, traced])
def test_torchscript_with_weights_is_refused_but_where_it_needs_nothing(make):
    for strategy, trains in ((harmony(), True), (harmony(), False), (HarmonyStrategy(microbatch_size=8), True)):
        with pytest.raises(UnsupportedError, match=r"net\.0 is a TorchScript module"):
            trainer(strategy).fit(Scripted(make, trains), loader(8))
    fits = []
    for strategy in ("auto", HarmonyStrategy(microbatch_size=8)):
        torch.manual_seed(0)
        fits.append(Scripted(make, trains=False))
        trainer(strategy).fit(fits[-1], loader(8))
    assert same_weights(*fits)
