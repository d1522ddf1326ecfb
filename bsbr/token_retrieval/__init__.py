"""BSBR with retrieval per token: each token weighs the chunks before it by what it reads there.

`attention` has the module, `inputs` the names of its tensors and options, `pytorch` the operations on tensors, `streaming` the
state of decoding, `cost` its FLOPs and bytes, and `reference` the definition, with loops and without shared code.
"""
