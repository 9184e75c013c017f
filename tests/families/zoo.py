"""Networks of every kind that users train, each tiny, with what they need to be trained on too little memory.

`memory` is that of each emulated GPU: so small that a network is several packs. `inexact` is the reason why a network,
although in pp mode, comes out equal to plain training only up to rounding; empty for those that are equal to the bit.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from harmony_lightning.testing import Step, adamw

SAMPLES, WIDTH, LENGTH, WORDS, CLASSES = 8, 32, 4, 64, 4

DP_SUMS = "each GPU sums its own microbatches first"
NORM = "a norm that uses its input twice sums both gradients before that of the residual branch is added"
OVERTAKING = "a microbatch that leaves out the last pack is differentiated before those in front of it"
TIED = "a weight used in several packs is summed over microbatches in each pack first, then over packs"
SHARED = "a weight used twice in one step has its uses summed in another order than microbatches"


@dataclass(frozen=True, kw_only=True)
class Family:
    net: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[Any, Any], torch.Tensor]
    memory: str
    inexact: str = ""
    module: Callable[..., Step] = Step
    is_larger_than_a_gpu: bool = True
    """Whether its weights alone exceed one GPU's memory."""

    def build(self, optimizer=adamw):
        return self.module(self.net(), self.loss, optimizer)

    def batches(self, steps=3):
        """The first step shows what the module does, the second knows it, the third follows one that did."""
        torch.manual_seed(1)
        return [self.batch() for _ in range(steps)]


FAMILIES: dict[str, Family] = {}


def family(name, *, batch, loss, memory="96KiB", **more):
    """Register what the decorated function or class builds."""

    def register(net):
        FAMILIES[name] = Family(net=net, batch=batch, loss=loss, memory=memory, **more)
        return net

    return register


# Batches and losses -------------------------------------------------------------------------------------------------


def vectors():
    return torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, WIDTH)


def words():
    return torch.randint(1, WORDS, (SAMPLES, LENGTH)), torch.randint(0, WORDS, (SAMPLES, LENGTH))


def sentences():
    """Words, a mask that pads some of them, and a class."""
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    mask[::3, -2:] = 0
    return {"input_ids": words()[0], "attention_mask": mask, "labels": torch.randint(0, 3, (SAMPLES,))}


def images():
    return torch.randn(SAMPLES, 3, 4, 4), torch.randint(0, CLASSES, (SAMPLES,))


def pictures():
    return torch.randn(SAMPLES, 3, 4, 4), torch.randn(SAMPLES, 3, 4, 4)


def regression(net, batch):
    return F.mse_loss(net(batch[0]), batch[1])


def classification(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def tagging(net, batch):
    return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())


def language(net, batch):
    return net(input_ids=batch[0], labels=batch[0]).loss


def keywords(net, batch):
    return net(**batch).loss


# From transformers --------------------------------------------------------------------------------------------------


@family("gpt2", batch=words, loss=language, memory="288KiB", inexact=TIED)
def gpt2():
    config = transformers.GPT2Config(n_layer=6, n_embd=WIDTH, n_head=2, vocab_size=WORDS, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


@family("llama", batch=words, loss=language, memory="136KiB", inexact=NORM)
def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=WORDS,
        )
    )  # fmt: skip


@family("t5", batch=words, loss=language, memory="432KiB", inexact=f"{TIED}; {NORM}")
def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=WIDTH, d_kv=8, d_ff=128, num_layers=4, num_heads=4, vocab_size=WORDS,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


@family("bert", batch=sentences, loss=keywords, memory="96KiB")
def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=WORDS,
            max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip


def image_keywords():
    pixels, labels = images()
    return {"pixel_values": pixels, "labels": labels}


@family("vit", batch=image_keywords, loss=keywords, memory="112KiB")
def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=4,
            patch_size=2, num_labels=CLASSES, hidden_dropout_prob=0.1,
        )
    )  # fmt: skip


@family("mixtral", batch=words, loss=language, memory="352KiB", inexact=NORM)
def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=WORDS, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        )
    )  # fmt: skip


# From torch ---------------------------------------------------------------------------------------------------------


@family("transformer", batch=words, loss=tagging, memory="112KiB")
class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Transformer(WIDTH, 2, 3, 3, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.words(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=x.device)
        return self.head(self.body(x, x.roll(1, 1), tgt_mask=mask))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        h += x
        return self.relu(h)


@family("resnet", batch=images, loss=classification, memory="80KiB")
def resnet():
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    return nn.Sequential(
        stem, *(Residual(16) for _ in range(5)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)
    )


@family("unet", batch=pictures, loss=regression, memory="224KiB")
class UNet(nn.Module):
    def __init__(self, c=24):
        super().__init__()

        def block(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU())

        self.down = nn.ModuleList([block(3, c), block(c, c), block(c, c), block(c, c)])
        self.middle = nn.Sequential(block(c, c), nn.Dropout2d(0.2))
        self.up = nn.ModuleList([block(2 * c, c) for _ in range(4)])
        self.head = nn.Conv2d(c, 3, 1)

    def forward(self, x):
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x)
        for up in self.up:
            skip = skips.pop()
            x = up(torch.cat([F.interpolate(x, skip.shape[-2:]), skip], 1))
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.rnns = nn.ModuleList([kind(WIDTH, WIDTH, batch_first=True) for _ in range(6)])
        self.deep = kind(WIDTH, 8, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(16, WORDS)

    def forward(self, ids):
        x = self.words(ids)
        for rnn in self.rnns:
            x = rnn(x)[0]
        return self.head(self.deep(x)[0])


@family("lstm", batch=words, loss=tagging, memory="224KiB")
def lstm():
    return Recurrent(nn.LSTM)


@family("gru", batch=words, loss=tagging, memory="152KiB")
def gru():
    return Recurrent(nn.GRU)


@family("alternating_cells", batch=words, loss=tagging, memory="136KiB", inexact=SHARED)
class AlternatingCells(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.before = nn.Sequential(*(Block() for _ in range(3)))
        self.even, self.odd = nn.GRUCell(WIDTH, 16), nn.GRUCell(16, WIDTH)
        self.after = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.before(self.words(ids))
        state, out, outs = x.new_zeros(len(ids), 16), x.new_zeros(len(ids), WIDTH), []
        for step in x.unbind(1):
            state = self.even(step + out, state)
            out = self.odd(state, out)
            outs.append(out)
        return self.head(self.after(torch.stack(outs, 1)))


# How modules are put together ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention-free half of a transformer block."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.narrow(F.gelu(self.wide(self.norm(x)))))


@family("nested_containers", batch=vectors, loss=regression, memory="80KiB")
class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.groups = nn.ModuleList(
            [nn.ModuleDict({"a": Block(), "b": nn.Sequential(Block(), nn.Tanh())}) for _ in range(2)]
        )
        self.tail = nn.Sequential(nn.Sequential(nn.Sequential(Block()), nn.Identity()), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        for group in self.groups:
            x = group["b"](group["a"](x)) + group["b"][1](x)
        return self.tail(x)


class Tied(nn.Module):
    """One matrix embeds words and scores them, through a head module or by hand."""

    def __init__(self, with_head):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(5)))
        self.head = None
        if with_head:
            self.head = nn.Linear(WIDTH, WORDS, bias=False)
            self.head.weight = self.words.weight

    def forward(self, ids):
        h = self.blocks(self.words(ids))
        return h @ self.words.weight.T if self.head is None else self.head(h)


@family("tied_head", batch=words, loss=tagging, memory="88KiB", inexact=TIED)
def tied_head():
    return Tied(with_head=True)


@family("tied_by_hand", batch=words, loss=tagging, memory="88KiB", inexact=TIED)
def tied_by_hand():
    return Tied(with_head=False)


@family("bare_parameters", batch=words, loss=lambda net, b: F.cross_entropy(net(b[0]), b[1][:, 0]))
class BareParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH + 1, WIDTH))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(5)])
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(5)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.words(ids)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block, gain in zip(self.blocks, self.gains, strict=True):
            x = block(x) * gain
        return self.head(x[:, 0])


def blocks(count=6):
    return nn.Sequential(*(Block() for _ in range(count)), nn.Linear(WIDTH, WIDTH))


@family("frozen_first", batch=vectors, loss=regression)
def frozen_first():
    net = blocks()
    net[:3].requires_grad_(False)
    return net


@family("frozen_middle", batch=vectors, loss=regression)
def frozen_middle():
    net = blocks()
    net[2:4].requires_grad_(False)
    return net


class Running(nn.Module):
    """Writes buffers of its own, one in place and one anew, and reads them before its first layer: state of a module that
    is not a layer is shared by all microbatches, which go on past each other at every layer."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.calls = self.calls + 1
        return self.block((x - self.mean) / (1 + self.calls))


@family("written_buffers", batch=vectors, loss=regression, memory="80KiB")
def written_buffers():
    return nn.Sequential(*(Running() for _ in range(5)), nn.Linear(WIDTH, WIDTH))


@family("spectral_norm", batch=vectors, loss=regression, memory="64KiB")
def spectral_norm():
    return nn.Sequential(*(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(18)))


@family("weight_norm", batch=vectors, loss=regression, memory="64KiB")
def weight_norm():
    return nn.Sequential(*(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(18)))


@family("auxiliary_loss", batch=vectors, loss=lambda net, b: net(*b))
class AuxiliaryLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])

    def forward(self, x, y):
        loss = 0.0
        for block in self.blocks:
            x = block(x)
            loss = loss + 0.1 * x.square().mean() + F.mse_loss(x, y)
        return loss


@family(
    "dropout_everywhere",
    batch=vectors,
    loss=lambda net, b: F.dropout(regression(net, (F.dropout(b[0], 0.1), b[1])), 0.1),
)
def dropout_everywhere():
    return nn.Sequential(*(nn.Sequential(nn.Dropout(0.3), Block(0.5), nn.AlphaDropout(0.1)) for _ in range(6)))


# How modules are called ---------------------------------------------------------------------------------------------


@family("called_twice", batch=vectors, loss=regression, inexact=SHARED)
class CalledTwice(nn.Module):
    """The first block is called again at the end, the second one twice in a row."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])

    def forward(self, x):
        first, second, *rest = self.blocks
        x = second(second(first(x)))
        for block in rest:
            x = block(x)
        return first(x)


@family("order_by_batch", batch=vectors, loss=regression, inexact=OVERTAKING)
class OrderByBatch(nn.Module):
    """Which way round the inner blocks are called depends on the data."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])

    def forward(self, x):
        first, *inner, last = self.blocks
        x = first(x)
        for block in inner if x.sum().item() > 0 else reversed(inner):
            x = block(x)
        return last(x)


class Skipping(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.blocks = nn.ModuleList([Block() for _ in range(6)])

    def forward(self, x):
        for block in self.blocks:
            if self.draw() < 0.6:
                x = block(x)
        return x if x.requires_grad else self.blocks[0](x)


def draw_torch():
    return torch.rand(())


@family("skipped_by_torch", batch=vectors, loss=regression, inexact=OVERTAKING)
def skipped_by_torch():
    return Skipping(draw_torch)


@family("skipped_by_python", batch=vectors, loss=regression, inexact=OVERTAKING)
def skipped_by_python():
    return Skipping(random.random)


@family("inplace_first", batch=vectors, loss=regression)
def inplace_first():
    """Layers whose first act is to write their input."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        *(nn.Sequential(nn.ReLU(inplace=True), Block()) for _ in range(6)),
        nn.Linear(WIDTH, WIDTH),
    )


@family("inplace_glue", batch=vectors, loss=regression)
class InplaceGlue(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        skip = self.blocks[0](x)
        for block in self.blocks[1:]:
            h = block(skip)
            h += skip
            h[:, :4] *= 0.5
            h.clamp_(-2, 2)
            skip = h
        return self.head(skip)


@family("checkpointed", batch=vectors, loss=regression)
class Checkpointed(nn.Module):
    """The user's own recomputation, in both of torch's kinds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(6)])

    def forward(self, x):
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=index % 2 == 0)
        return x


# State that training_step keeps -------------------------------------------------------------------------------------


class MovingAverage(Step):
    """A second network, as in BYOL, follows the first one."""

    def __init__(self, net, loss, optimizer):
        super().__init__(net, loss, optimizer)
        self.target = blocks(3).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            goal = self.target(batch[1])
        return F.mse_loss(self.net(batch[0]), goal)

    @torch.no_grad()
    def follow(self):
        for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
            slow.mul_(0.9).add_(fast, alpha=0.1)


class AverageOfSteps(MovingAverage):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.follow()


class AverageInTrainingStep(MovingAverage):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.follow()
        return loss


FAMILIES["average_of_steps"] = Family(
    net=lambda: blocks(3), batch=vectors, loss=regression, memory="96KiB", module=AverageOfSteps
)
AVERAGE_IN_TRAINING_STEP = Family(
    net=lambda: blocks(3), batch=vectors, loss=regression, memory="96KiB", module=AverageInTrainingStep
)
"""Only for minibatches of one microbatch: layer-major, a microbatch does not see what others do at their end."""


class Queue(Step):
    """Keys of earlier batches are negatives, as in MoCo; each step writes its own into a ring."""

    def __init__(self, net, loss, optimizer):
        super().__init__(net, loss, optimizer)
        self.register_buffer("queue", F.normalize(torch.randn(12, WIDTH), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        query = F.normalize(self.net(batch[0]), dim=1)
        key = F.normalize(batch[1], dim=1)
        positive = (query * key).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ self.queue.clone().detach().T], 1) / 0.2
        with torch.no_grad():
            place = int(self.place)
            self.queue[place : place + len(key)] = key
            self.place[()] = (place + len(key)) % len(self.queue)
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=logits.device))


FAMILIES["queue"] = Family(net=blocks, batch=vectors, loss=regression, memory="96KiB", module=Queue)
