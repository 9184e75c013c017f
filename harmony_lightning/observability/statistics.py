"""What has been done so far, as a frozen record."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Exact counts since training or evaluation was set up. Bytes are payload: what the tensors hold."""

    steps: int
    """Training steps (minibatches)."""
    num_microbatches: int
    """Microbatches of the last minibatch's plan; 0 before the first step."""
    num_packs: int
    """Packs of the plan; 0 before the first step."""
    swap_in_bytes: int
    """Weights, and states of the optimizer where devices update, brought to devices."""
    swap_out_bytes: int
    """Gradients brought to the host; weights and states of the optimizer where devices update."""
    p2p_bytes: int
    """Activations and gradients moved from device to device."""
    stash_in_bytes: int
    """Layer inputs that came back from the host."""
    stash_out_bytes: int
    """Layer inputs that went to the host to wait for backward."""
    unplaced_stashes: int
    """Tensors of these in host memory of their own: those of the first steps, from which places for others are planned, and
    what was not foreseen."""
    input_bytes: int
    """Minibatches and module buffers brought to devices."""
    joint_forwards: int
    """Calls of layers that served several microbatches at once."""
    out_of_turn: int
    """Packs that took memory of others in use: user code has called layers in another order than the plan's."""
    short_of_memory: int
    """Steps, of evaluation too, in which a device had no memory left, and what was to stay there had to go."""
    updates_just_in_time: int
    """Optimizer steps that were taken pack by pack, each as soon as its gradients were complete."""
    updates_whole: int
    """Optimizer steps over all weights at once, because something had to see all gradients first."""
    updates_on_devices: int
    """Updates of one pack each that were taken on a device."""
    peak_device_bytes: tuple[int, ...]
    """The most bytes that were alive at once, per device."""
