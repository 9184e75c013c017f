"""Between Lightning and the runtime: the strategy, and what each of Lightning's features needs of it.

    mixin              HarmonyMixin: every hook of Lightning's Strategy, in three parts:
    session              from set-up to teardown, and what is around every step
    training             training steps, backward, the optimizer's step
    evaluation           validation, test and prediction steps
    planning           which plan the engine is under, and how a batch is cut
    updates            which update an optimizer's step gets
    overrides          what the user's own hooks expect to find
    precision          which precision plugins work, and what they need
    merged_log         `self.log` of microbatches, once per minibatch
    merged_metrics     torchmetrics over microbatches
    merged_profile     profilers over microbatches
    microbatch_check   compares the loss of a minibatch with that of its microbatches
    materialise        weights that were declared and not made
    compiled           what of torch.compile takes part
    one_task           refuses clusters that start several processes

Free of Lightning imports: its two packages have separate classes, and what is needed of them comes in as an argument.
"""
