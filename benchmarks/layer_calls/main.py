"""How much Python time does a layer's call take beyond the layer's own?

Trains a model of many small layers on the host, four ways over the same microbatches: plainly, plainly with
`torch.utils.checkpoint` around every layer, and with strategy="harmony", one layer per pack and all in one, whose backward
is part of its forward. Prints CPU time of the thread that runs the step, divided by the number of layer calls; of the
fastest step, as other load on the machine only adds.
"""

import argparse
import functools
import platform
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from harmony_lightning import HarmonyStrategy
from harmony_lightning.runtime.engine import Engine
from harmony_lightning.runtime.updates.update import JustInTimeUpdate

WIDTH, MICROBATCH, WARM_UP = 16, 2, 3


class Layer(nn.Module):
    """Small enough to cost its functions' calls and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Block(nn.Module):
    """The same three times over: eighteen weights, as a transformer's block has about."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


KINDS = {"layer": Layer, "block": Block}


class Deep(L.LightningModule):
    def __init__(self, kind: type[nn.Module], num_layers: int, is_checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(num_layers))
        self.is_checkpointed = is_checkpointed

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.is_checkpointed else layer(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def timed(function: Callable[..., Any], seconds: list[float], without: list[float]) -> Callable[..., Any]:
    """The function; what each call takes is noted, but for what is noted in `without` meanwhile."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        num_before, start = len(without), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.thread_time() - start - sum(without[num_before:]))

    return wrapper


def measure(options: argparse.Namespace, how: str) -> tuple[float, float]:
    """Microseconds of forward and of backward per layer call."""
    torch.manual_seed(0)
    kind = KINDS[options.kind]
    module = Deep(kind, options.layers, is_checkpointed=how == "checkpoints")
    forward: list[float] = []
    backward: list[float] = []
    updates: list[float] = []
    """The optimizer's, just in time within the backward of strategy="harmony"; plainly they come behind it."""
    places: list[tuple[type, str, list[float]]]
    is_ours = how.startswith("harmony")
    if is_ours:
        strategy: Any = HarmonyStrategy(
            microbatch_size=MICROBATCH, layers=[kind], one_layer_per_pack=how == "harmony", plan="sizes"
        )
        places = [(Engine, "forward", forward), (Engine, "backward", backward), (JustInTimeUpdate, "__call__", updates)]
    else:
        strategy = "auto"
        places = [(Deep, "training_step", forward), (Deep, "backward", backward)]
    originals = [owner.__dict__.get(name) for owner, name, _ in places]
    for owner, name, seconds in places:
        setattr(owner, name, timed(getattr(owner, name), seconds, [] if seconds is updates else updates))
    num_batches = 1 if is_ours else options.microbatches
    samples = torch.randn(MICROBATCH * options.microbatches * (WARM_UP + options.steps), WIDTH)
    try:
        L.Trainer(
            strategy=strategy,
            accelerator="cpu",
            accumulate_grad_batches=num_batches,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, DataLoader(samples, batch_size=MICROBATCH * options.microbatches // num_batches))
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
    calls = options.layers * options.microbatches // num_batches
    fastest = [min(seconds[WARM_UP * num_batches :]) for seconds in (forward, backward)]
    return fastest[0] / calls * 1e6, fastest[1] / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"layers": 48, "microbatches": 4, "steps": 10, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind", choices=KINDS, default="layer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = ("plain", "checkpoints", "harmony", "harmony, one pack")
    rounds = [{how: measure(options, how) for how in ways} for _ in range(options.rounds)]
    found = {how: [min(r[how][part] for r in rounds) for part in (0, 1)] for how in ways}
    own = found["plain"]
    table = Table(
        "", "forward", "backward", *(f"{part} beyond the layer's own" for part in ("forward", "backward", "both"))
    )
    for how in ways:
        forward, backward = found[how]
        again = 0.0 if how == "plain" else own[0]  # a second forward belongs to recomputing
        beyond = [forward - own[0], backward - own[1] - again]
        apart = [f"{cell:.0f} us" for cell in (forward, backward, *beyond)]
        if how == "harmony, one pack":
            apart[1:] = ["", "", ""]
        table.add_row(how, *apart, f"{sum(beyond):.0f} us")
    Console().print(table)
    print(f"torch {torch.__version__}, lightning {L.__version__}, {platform.machine()}")


if __name__ == "__main__":
    main()
