"""What a run did, in the order in which it did it: a module, a callback and a logger that write everything down.

Made for each of the two Lightning packages, whose classes differ.
"""

import functools

import torch
from torchmetrics import MeanMetric, MeanSquaredError
from torchmetrics.classification import BinaryAccuracy

WIDTH = 32
SEES_GRADIENTS = {"on_before_optimizer_step", "on_after_backward"}
NOT_RECORDED = {"log", "log_dict", "training_step", "forward", "on_gpu"}
# A module that overrides these sees gradients between backward and step, and weights are then updated after backward.
BETWEEN = {
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "configure_gradient_clipping",
    "optimizer_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
}
MORE_HOOKS = {"configure_gradient_clipping", "optimizer_step", "lr_scheduler_step", "optimizer_zero_grad", "backward"}


def hooks_of(base):
    found = {name for name in dir(base) if name.startswith("on_") and callable(getattr(base, name))}
    more = {"setup", "teardown", "state_dict", "load_state_dict"} if base.__name__ == "Callback" else MORE_HOOKS
    return sorted((found | more | ({"setup", "teardown"})) - NOT_RECORDED)


def recording_class(base, hooks, events, owner):
    """A subclass of `base` that notes each hook before it does what `base` does."""

    def noting(hook):
        @functools.wraps(getattr(base, hook))
        def noted(self, *args, **kwargs):
            events.append((owner, hook, *map(brief, (*args, *kwargs.values()))))
            if hook in SEES_GRADIENTS and owner == "module":
                events.append(("gradients", [None if p.grad is None else p.grad.clone() for p in self.parameters()]))
            return getattr(base, hook)(self, *args, **kwargs)

        return noted

    return type(f"Recording{base.__name__}", (base,), {hook: noting(hook) for hook in hooks})


def brief(value):
    """An argument of a hook, as far as it is the same in two runs."""
    if isinstance(value, int | float | str | None):
        return value
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.device.type, value.requires_grad)
    if isinstance(value, list | tuple):
        return [brief(item) for item in value]
    if isinstance(value, dict):
        return {key: brief(item) for key, item in value.items()} if len(value) < 6 else sorted(map(str, value))
    if isinstance(value, torch.optim.Optimizer):
        return "optimizer"
    return type(value).__name__.removeprefix("Recording")


def make_logger(pl):
    class Rows(pl.loggers.logger.Logger):
        name, version = "rows", 0

        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append({"step": step, **metrics})

        def log_hyperparams(self, *args, **kwargs):
            pass

    return Rows()


def make_callback(pl, events, outputs, sees_gradients):
    """Also keeps what `on_train_batch_end` is given, and the metrics that it can read then."""
    hooks = [h for h in hooks_of(pl.Callback) if sees_gradients or h not in BETWEEN]
    base = recording_class(pl.Callback, hooks, events, "callback")

    class Recorder(base):
        def on_train_batch_end(self, trainer, module, given, batch, batch_idx):
            super().on_train_batch_end(trainer, module, given, batch, batch_idx)
            outputs.append((given, dict(trainer.callback_metrics), dict(trainer.progress_bar_metrics)))

        def on_validation_batch_end(self, trainer, module, given, batch, batch_idx, dataloader_idx=0):
            super().on_validation_batch_end(trainer, module, given, batch, batch_idx, dataloader_idx)
            outputs.append((given, dict(trainer.callback_metrics), None))

    return Recorder()


def make_module(pl, case, events):
    """A chain of layers with a skip and a bare parameter, configured by the case."""
    hooks = [hook for hook in hooks_of(pl.LightningModule) if case["sees_gradients"] or hook not in BETWEEN]
    base = recording_class(pl.LightningModule, hooks, events, "module")

    class Module(base):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                *(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()) for _ in range(7))
            )
            self.shift = torch.nn.Parameter(torch.randn(WIDTH) / 4)
            self.head = torch.nn.Linear(WIDTH, 1)
            self.automatic_optimization = case["optimization"] == "automatic"
            self.train_mean, self.val_mean = MeanMetric(), MeanMetric()
            self.train_error, self.accuracy = MeanSquaredError(), BinaryAccuracy()

        def forward(self, inputs):
            return self.head(self.layers(inputs + self.shift) + inputs).squeeze(1)

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            predictions = self(inputs)
            loss = torch.nn.functional.mse_loss(predictions, targets)
            self.log_training(loss, predictions.detach(), targets, batch_idx)
            if self.automatic_optimization:
                return self.output(loss, predictions, batch_idx)
            for optimizer in as_list(self.optimizers()):
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in as_list(self.optimizers()):
                optimizer.step()
            if case["scheduler"] == "step":
                for scheduler in as_list(self.lr_schedulers()):
                    scheduler.step()
            return self.output(loss, predictions, batch_idx)

        def output(self, loss, predictions, batch_idx):
            match case["output"]:
                case "tensor":
                    return loss
                case "dict":
                    return {"loss": loss, "twice": loss.detach() * 2, "count": 3, "text": "x"}
                case "rows":
                    return {
                        "loss": loss,
                        "predictions": predictions.detach(),
                        "nested": {"rows": [predictions.detach()]},
                    }
                case "none":
                    return None if batch_idx == 1 else loss

        def log_training(self, loss, predictions, targets, batch_idx):
            match case["logging"]:
                case "mean":
                    self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
                    self.log("step_only", loss * 2)
                case "reductions":
                    for name in ("min", "max", "sum"):
                        value = getattr(predictions, name)()
                        self.log(name, value, on_step=True, on_epoch=True, reduce_fx=name)
                    self.log("epoch_mean", predictions.mean(), on_step=False, on_epoch=True, reduce_fx=torch.mean)
                case "sized":
                    self.log("loss", loss, batch_size=len(targets), on_epoch=True)
                    self.log("index", batch_idx, on_step=True, prog_bar=True)
                case "metric":
                    self.train_mean.update(predictions)
                    self.log("train_mean", self.train_mean, on_step=False, on_epoch=True)
                    self.train_error(predictions, targets.to(predictions.dtype))
                    self.log("train_error", self.train_error, on_step=True, on_epoch=True, prog_bar=True)
                    self.accuracy(predictions.sigmoid(), targets > 0)
                    self.log("accuracy", self.accuracy, on_step=True, on_epoch=False)
                case "dict":
                    self.log_dict({"a": loss, "b": predictions.mean(), "c": 0.5}, on_step=True, on_epoch=True)

        def validation_step(self, batch, batch_idx):
            inputs, targets = batch
            predictions = self(inputs)
            self.val_mean(predictions)
            self.log("val_mean", self.val_mean)
            self.log("val_loss", torch.nn.functional.mse_loss(predictions, targets), prog_bar=True)
            return {"predictions": predictions}

        def configure_optimizers(self):
            optimizers = [make_optimizer(case["optimizer"], self.parameters())]
            if case["optimization"] == "two optimizers":
                halves = self.layers.parameters(), [self.shift, *self.head.parameters()]
                optimizers = [make_optimizer(case["optimizer"], half) for half in halves]
            if case["scheduler"] == "none":
                return optimizers
            return optimizers, [make_scheduler(case["scheduler"], optimizer) for optimizer in optimizers]

    return Module()


def as_list(value):
    return value if isinstance(value, list) else [value]


def make_optimizer(name, parameters):
    match name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-2)
        case "groups":
            first, *rest = parameters
            return torch.optim.RMSprop([{"params": [first], "lr": 1e-3}, {"params": rest}], lr=1e-3, eps=1e-2)


def make_scheduler(name, optimizer):
    schedulers = torch.optim.lr_scheduler
    match name:
        case "step":
            return {"scheduler": schedulers.StepLR(optimizer, 1, 0.7), "interval": "step"}
        case "epoch":
            return {"scheduler": schedulers.ExponentialLR(optimizer, 0.5), "interval": "epoch", "name": "lr"}
        case "plateau":
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {"scheduler": plateau, "monitor": "val_loss", "strict": False}
