"""Weights: masters on the host, and what of them is on which device.

masters     the host's, one arena per pack; casts: of narrow ones, what travels instead
residency   one device: swap-in and release of its weight_slots; host_weights: the host as a device
arena       many weights in one flat piece of memory
narrow      weights that layers use only as autocast casts them
buffers     module buffers; glue_weights: weights that user code uses between layers
"""
