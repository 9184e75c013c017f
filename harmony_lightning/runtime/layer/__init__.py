"""One call of a layer, as one node of the microbatch's autograd graph.

entry     takes the call                                node      forward and backward of the autograd node
call      what one call knows                           graph     what a layer's own graph may reach
watching  runs the layer's own code                     backward  its second run, and its gradients
joint     one forward for several microbatches          objects   tensors within the objects it is given
"""
