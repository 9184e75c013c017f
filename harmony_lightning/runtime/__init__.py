"""The runtime room: carries a plan out. Enter at `engine`.

engine      between steps, and what the strategy asks for
step        the order of a training step: forward and backward, pack by pack; visits: which pack is next
together    evaluation steps that share a pass
user_code   what user code meets while it runs
microbatch  the user's training_step on a slice of the minibatch, as a greenlet
segment     what a microbatch does in one visit to a pack; how tensors get in
site        the seam in the user's modules
layer       one layer's forward and backward as one autograd node; joint: one forward for several microbatches
residency   weights on devices        gradients  their way back
buffers     module buffers            stash      what waits from forward to backward
arena       flat memory               worker     the host's thread; update  what it does to weights
separability  whether an optimizer may update pack by pack
derivatives, host_arithmetic          what user code differentiates, and computes with masters, by itself
randomness, thread_state, structure   what is kept per microbatch and per call
minibatch, outputs                    cutting the batch, merging the results
trace, counters                       what a step shows
"""
