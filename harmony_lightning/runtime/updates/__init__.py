"""From gradients to new weights.

gradients       between a layer's backward and `Parameter.grad`: added up on devices in gradient_slots, and over devices by
                device_sums, brought to the host by gradient_swap_out, where they arrive in host_buffers
update          a pack's weights are stepped as soon as its gradients are complete
separability    whether an optimizer may do that
device_update   the same on the device; update_slots: its memory there; optimizer_states, state_sizes: what comes along
"""
