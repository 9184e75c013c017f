"""The runtime room: carries a plan out. Enter at `engine`.

engine      between steps, and what the strategy asks for
step        the order of a training step: forward and backward, pack by pack; visits: which pack is next
together    evaluation steps that share a pass
user_code   what user code meets while it runs: glue, checkpointing, host_arithmetic, derivatives; between: between steps
microbatch  the user's training_step on a slice of the minibatch, as a greenlet
segment     what a microbatch does in one visit to a pack; how tensors get in; moved: copies from elsewhere
layer/      one layer's forward and backward as one autograd node; site: the seam in the user's modules
state       what is where while a step runs; device_memory: what gives way where memory is short
swapped_weights  the weights of all devices, with weights/: of one, and the masters; updates/: gradients, and what they do
stash       what waits from forward to backward; stash_places: where on the host; activations: what layers save
transfer    copies from device to device
batch/      cutting minibatches, merging results
worker      the host's threads
randomness, thread_state, structure   what is kept per microbatch and per call
trace, meter, counters                what a step shows
"""
