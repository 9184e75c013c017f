"""From gradients to new weights.

gradients       added up on devices, brought to the host, folded into `Parameter.grad`; host_buffers: where they arrive
update          a pack's weights are stepped as soon as its gradients are complete
separability    whether an optimizer may do that
device_update   the same on the device; update_slots: its memory there; optimizer_states, state_sizes: what comes along
"""
